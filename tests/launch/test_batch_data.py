"""Files of requests over two replicas in one Ray that the module's runs share: actors, ranks and tasks are real."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dist_vlm.config import EngineConfig, resolve
from dist_vlm.executor.base import StartError
from dist_vlm.executor.ray_cluster import RayCluster
from dist_vlm.launch import batch_data, cli
from dist_vlm.launch.jsonl_request import RequestReader
from dist_vlm.sampling import SamplingParams

from ..executor.processes import descendants
from ..server.picture_hosts import OTHER, picture_host

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
PICTURES = sorted(path.name for path in (DEMO / "pictures").glob("*.png"))
ENGINE = ["--model", str(DEMO / "checkpoint"), "--device", "cpu", "--dtype", "float32", "--threads-per-rank", "1"]
ENGINE += ["--kv-cache-memory-gib", "0.03", "--max-num-seqs", "8", "--kernels", "torch", "--no-progress"]
NETWORKS = ["--allowed-media-networks", "127.0.0.0/8"]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """Two replicas of one rank take four CPUs; two are left for pictures."""
    cluster = RayCluster()
    cluster.connect(None, num_cpus=6, use_gpus=False, timeout_s=60)
    yield
    cluster.close()


class FileRun:
    def __init__(self, folder: Path, lines: list[dict[str, Any]]) -> None:
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.input.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def words(self, *more: str) -> list[str]:
        return ["generate", *ENGINE, "--input", str(self.input), "--output", str(self.output), *more]

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text(encoding="utf-8").splitlines()]

    def by_index(self) -> dict[int, dict[str, Any]]:
        """Each line's record; fails where a line has two."""
        records = {record["index"]: record for record in self.records()}
        assert len(records) == len(self.records())
        return records

    def num_answers(self) -> int:
        return self.output.read_bytes().count(b"\n") if self.output.exists() else 0

    def when(self, num_answers: int, act: Callable[[], None]) -> threading.Thread:
        """Does something once there are so many answers."""

        def watch() -> None:
            end = time.monotonic() + 120
            while self.num_answers() < num_answers and time.monotonic() < end:
                time.sleep(0.005)
            act()

        thread = threading.Thread(target=watch)
        thread.start()
        return thread


def questions(port: int) -> list[dict[str, Any]]:
    """Lines of every form, wrong ones among them."""
    url = f"http://{OTHER}:{port}/picture.png"
    wrong = {
        7: {"prompt": "a", "promt": "b"},
        13: {"prompt": "a", "images": ["absent.png"]},
        21: {"prompt": "a", "images": [f"http://{OTHER}:{port}/page.html"], "id": "page"},
        34: {"prompt": "a", "top_p": 3},
        40: {"prompt": "<image> <image>", "images": [PICTURES[0]]},
        41: {"messages": [{"role": "wizard", "content": "a"}]},
        50: {"prompt": "a", "deep": json.loads("[" * 700 + "]" * 700)},
    }
    lines = []
    for index in range(1, 67):
        picture = url if index % 10 == 3 else PICTURES[index % len(PICTURES)]
        line: dict[str, Any] = {"prompt": "What do you see?", "images": [picture], "max_tokens": 8 + index * 7 % 60}
        if index % 4 == 0:
            parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "Name a colour."}]
            line = {"messages": [{"role": "user", "content": parts}], "id": f"talk {index}", "logprobs": 1}
        if index % 9 == 0:
            line |= {"temperature": 1.0, "n": 1 + index % 2}
        lines.append(wrong.get(index, line | {"ignore_eos": True}))
    return lines


def are_alike(one: Any, other: Any) -> bool:
    """Equal, but for the last digits of a probability, which depend on what else was computed in the same step."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(are_alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(are_alike, one, other))
    if isinstance(one, float):
        return isinstance(other, float) and math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-4)
    return bool(one == other)


def named(name: str) -> list[int]:
    """Processes of this one's Ray that call themselves so; a regular expression."""
    found = []
    for pid in descendants(os.getpid()):
        try:
            told = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if re.match(f"ray::{name}", told):
            found.append(pid)
    return found


def ticks(pid: int) -> int:
    """Processor time that it has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_replicas_give_the_answers_of_one_engine_though_a_rank_and_an_actor_are_killed(
    ray_here: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in PICTURES:
        shutil.copy(DEMO / "pictures" / name, tmp_path / name)
    killed: list[int] = []

    def kill(name: str) -> None:
        # One that answers: the other replica may be starting yet, and a run does not begin without all of them.
        killed.append(max(named(name), key=ticks))
        os.kill(killed[-1], signal.SIGKILL)

    with picture_host() as host:
        one = FileRun(tmp_path, questions(host.port))
        one.output = tmp_path / "one.jsonl"
        assert cli.main(one.words(*NETWORKS, "--executor", "inline")) == 0
        two = FileRun(tmp_path, questions(host.port))
        watchers = [two.when(5, lambda: kill("Worker")), two.when(30, lambda: kill("EngineActor"))]
        capfd.readouterr()
        assert cli.main(two.words(*NETWORKS, "--replicas", "2")) == 0
        for watcher in watchers:
            watcher.join()
    err = capfd.readouterr().err
    assert len(set(killed)) == 2
    assert "dist-vlm: 66 lines answered, 7 of them with an error" in err
    told, expected = two.by_index(), one.by_index()
    assert told.keys() == expected.keys()
    assert [index for index in told if not are_alike(told[index], expected[index])] == []
    assert {index for index, record in two.by_index().items() if "error" in record} == {7, 13, 21, 34, 40, 41, 50}
    # They went over both.
    assert [record["index"] for record in two.records()] != sorted(two.by_index())
    end = time.monotonic() + 20
    while left := named("EngineActor") + named("Worker"):
        assert time.monotonic() < end, left
        time.sleep(0.1)


def test_a_run_that_is_killed_is_gone_on_with(ray_here: None, tmp_path: Path) -> None:
    import ray

    lines = [{"prompt": f"line {index}", "max_tokens": 1 + index % 20, "id": f"n{index}"} for index in range(1, 121)]
    whole, cut = FileRun(tmp_path, lines), FileRun(tmp_path, lines)
    whole.output = tmp_path / "whole.jsonl"
    assert cli.main(whole.words("--executor", "fake")) == 0
    words = cut.words("--executor", "fake", "--replicas", "2")
    address = ray.get_runtime_context().gcs_address
    # Without the second, Ray takes the network card's address for 127.0.0.1, where nothing listens.
    environment = os.environ | {"RAY_ADDRESS": address, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    run = subprocess.Popen([sys.executable, "-m", "dist_vlm.launch.cli", *words], env=environment)
    cut.when(20, run.kill).join()
    assert run.wait(60) == -signal.SIGKILL
    before = cut.output.read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    assert 20 <= kept.count(b"\n") < 120
    assert cli.main([*words, "--resume"]) == 0
    assert cut.output.read_bytes().startswith(kept)
    assert cut.by_index() == whole.by_index()


@contextmanager
def forgetful_host() -> Iterator[str]:
    """The first request for /late.png is never answered; after it, /other.png takes its time."""
    asked, over = Counter[str](), threading.Event()
    picture = (DEMO / "pictures" / PICTURES[0]).read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked[self.path] += 1
            if self.path == "/late.png" and asked[self.path] == 1:
                over.wait()
                return
            if asked[self.path] == 2:
                time.sleep(1.0 if self.path == "/other.png" else 0.0)
            self.send_response(200)
            self.send_header("Content-Length", str(len(picture)))
            self.end_headers()
            self.wfile.write(picture)

        def log_message(self, *arguments: Any) -> None: ...

    with ThreadingHTTPServer((OTHER, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://{OTHER}:{server.server_port}"
        finally:
            over.set()
            server.shutdown()
            thread.join()


def test_each_line_is_answered_once_though_a_task_is_killed_and_its_lines_are_ready_otherwise_then(
    ray_here: None, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill() -> None:
        time.sleep(1.0)  # so that all has come that can
        killed.extend(named(".*prepare_part"))
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    with forgetful_host() as address:
        images = {5: [f"{address}/late.png"], 6: [f"{address}/other.png"]}
        run = FileRun(tmp_path, [{"prompt": "a", "images": images.get(index, [])} for index in range(1, 9)])
        watcher = run.when(4, kill)
        words = run.words(*NETWORKS, "--executor", "fake", "--replicas", "2", "--image-fetch-timeout-s", "120")
        assert cli.main(words) == 0
        watcher.join()
    assert len(killed) == 1
    assert sorted(run.by_index()) == list(range(1, 9))
    assert [record for record in run.records() if "error" in record] == []


def test_what_does_not_fit_is_told(ray_here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = FileRun(tmp_path, [{"prompt": "a"}])
    assert cli.main(run.words("--executor", "fake", "--replicas", "3")) == 1
    wanted = "3 replicas and a task that prepares pictures need 7 CPU; Ray has 6 in all"
    assert wanted in capsys.readouterr().err
    assert cli.main(run.words("--executor", "fake", "--replicas", "2", "-tp", "2", "--resume")) == 1
    assert "2 replicas and a task that prepares pictures need 7 CPU" in capsys.readouterr().err


def test_an_engine_that_does_not_start_says_why(
    ray_here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = FileRun(tmp_path, [{"prompt": "a"}] * 3)
    words = [word if word != "0.03" else "0.0001" for word in run.words("--replicas", "2")]
    assert cli.main(words) == 1
    err = capsys.readouterr().err
    assert "kv_cache" in err or "blocks" in err
    assert run.num_answers() == 0


def test_an_actor_without_a_place_is_not_waited_for_for_ever(
    ray_here: None, tiny_facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    monkeypatch.setattr(batch_data, "_IMPORTS_S", 0.5)
    config = resolve(EngineConfig.from_fields(model=str(tiny_facts), device="cpu", start_timeout_s=0.5))
    reader = RequestReader(vision=config.vision, defaults=SamplingParams(), seed=0)
    group = placement_group([{"CPU": 100.0}])
    try:
        with pytest.raises(StartError, match=r"did not start in 1 s; free in the cluster: \d+ CPU"):
            asyncio.run(batch_data._Starter(config, reader, [group]).start(0))
    finally:
        remove_placement_group(group)


def test_an_actor_has_one_engine_in_its_own_process(tiny_facts: Path) -> None:
    given = EngineConfig.from_fields(
        model=str(tiny_facts), device="cpu", replicas=3, max_replicas=4, engine_process=True, ray_address="auto"
    )
    made = batch_data.one_engine(resolve(given))
    assert (made.most_replicas, made.parallel.engine_process, made.parallel.ray_address) == (1, False, None)
