"""Jobs on a head that asks for a token, used from outside as its users do."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray_head
from ray_head import Head, free_port

from dist_vlm.config_load import load_config
from dist_vlm.executor.ray_cluster import _set_auth
from dist_vlm.launch import cli
from dist_vlm.launch.job_client import JobClient
from dist_vlm.launch.job_package import packed

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs" / "demo.yaml")
PICTURES = ROOT / "examples" / "demo" / "pictures"
QUESTIONS = json.loads((PICTURES / "questions.json").read_text())
# One rank of the demo, which the head's cores are enough for beside the job's own.
SMALL = ("--device", "cpu", "-tp", "1", "--kernels", "torch", "--threads-per-rank", "1")

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head.started(num_cpus=6) as head:
        yield head


@pytest.fixture
def token(head: Head, monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    """The head, with its token in this process, whose Ray other tests may have used without one."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.url)
    before = _set_auth({name: head.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")})
    yield head
    _set_auth(before)


def submit(*words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """In a process of its own: Ray reads the token once."""
    return subprocess.run(
        [sys.executable, "-m", "dist_vlm.launch.cli", "submit", *words],
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | env,
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=200, cwd="/",
    )  # fmt: skip


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_batch_job_answers_from_outside(head: Head, tmp_path: Path) -> None:
    folder, answers = tmp_path / "folder", tmp_path / "answers.jsonl"
    folder.mkdir()
    lines = [{"prompt": one["prompt"], "images": [str(PICTURES / one["image"])]} for one in QUESTIONS]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / ".gitignore").write_text("*.yaml\n")
    words = ("--input", "questions.jsonl", "--output", str(answers), "--media-root", str(PICTURES), "--no-progress")
    # An address in the environment is not the one that is given.
    elsewhere = {**head.environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{free_port()}"}
    given = ("--address", head.url, "--working-dir", str(folder))
    done = submit("--wait", *given, DEMO, "--", "generate", *words, *SMALL, env=elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(QUESTIONS)} lines answered" in done.stdout, "the job's log is followed"
    assert "succeeded, exit status 0" in done.stderr
    found = {answer["index"]: answer["text"].strip() for answer in lines_of(answers)}
    assert found == {index: one["answer"] for index, one in enumerate(QUESTIONS, start=1)}
    assert head.token not in done.stdout + done.stderr


def test_the_job_and_what_it_starts_run_the_package_it_took_along(token: Head, tmp_path: Path) -> None:
    program = (
        "import ray, dist_vlm; ray.init(log_to_driver=False); "
        "found = ray.get(ray.remote(lambda: __import__('dist_vlm').__file__).remote()); print(dist_vlm.__file__, found)"
    )
    runtime_env = packed(load_config(DEMO), tmp_path, working_dir=None, drain_timeout_s=1, variables={}, environ={})
    client, log = JobClient(token.url, "--address"), list[str]()
    job_id = client.submit(f"python -c {shlex.quote(program)}", runtime_env=runtime_env, job_id=None)
    assert client.follow(job_id, log.append).status == "SUCCEEDED", log
    places = "".join(log).splitlines()[-1].split()
    assert len(places) == 2
    for place in places:
        assert "py_modules_files" in place and place.endswith("/dist_vlm/__init__.py"), place


def test_the_exit_status_is_the_jobs(head: Head, tmp_path: Path) -> None:
    words = ("--input", str(tmp_path / "missing.jsonl"), "--output", str(tmp_path / "answers.jsonl"))
    done = submit("--wait", DEMO, "--", "generate", *words, *SMALL, env=head.environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "must be an existing file" in done.stdout
    assert "failed, exit status 2" in done.stderr


@pytest.mark.parametrize("token", [None, "0" * 64])
def test_without_the_token_it_is_refused(head: Head, tmp_path: Path, token: str | None) -> None:
    given = {} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    done = submit("--address", head.url, DEMO, "--", "check", *SMALL, env={"HOME": str(tmp_path), **given})
    assert done.returncode == 1
    assert f"the Ray cluster at {head.url} (--address) asks for a token" in done.stderr
    assert ("none was sent" in done.stderr) == (token is None)
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_server_is_used_from_outside_and_finishes_what_it_has_when_it_is_stopped(token: Head) -> None:
    port = free_port()
    words = ("serve", "--port", str(port), "--replicas", "1", "--drain-timeout-s", "77", *SMALL)
    submitted = submit(
        DEMO, "--job-id", "the-server", "--", *words, env={**token.environment, "DIST_VLM_API_KEY": "secret-key"}
    )
    assert submitted.returncode == 0, submitted.stderr
    assert submitted.stdout == "the-server\n"
    assert f"ray job stop --address {token.url} the-server" in submitted.stderr
    client = JobClient(token.url, "--address")
    url = f"http://127.0.0.1:{port}"
    _await_ready(url, lambda: client.details("the-server"))
    assert httpx.get(f"{url}/v1/models").status_code == 401, "the key has gone along"
    assert int(client.details("the-server").runtime_env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 77
    with httpx.Client(base_url=url, headers={"Authorization": "Bearer secret-key"}, timeout=60) as http:
        model = http.get("/v1/models").json()["data"][0]["id"]
        body = {"model": model, "prompt": "USER: Hello ASSISTANT:", "max_tokens": 400, "ignore_eos": True}
        with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            events = response.iter_lines()
            assert next(events).startswith("data: {")
            client.stop("the-server")
            texts = [json.loads(line[6:]) for line in events if line.startswith("data: {")]
    assert texts[-1]["choices"][0]["finish_reason"] == "length", "it was cut off"
    wait_until(lambda: client.details("the-server").status.is_terminal(), "the job does not end")
    again = submit(DEMO, "--job-id", "the-server", "--", *words, env=token.environment)
    assert again.returncode == 1
    assert f"job the-server exists already at {token.url}" in again.stderr
    assert "Traceback" not in again.stderr


def test_a_killed_batch_is_completed_by_submitting_it_again(token: Head, tmp_path: Path) -> None:
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    line = {"prompt": QUESTIONS[0]["prompt"], "images": [QUESTIONS[0]["image"]], "max_tokens": 40, "ignore_eos": True}
    questions.write_text("".join(json.dumps({**line, "id": f"q{number}"}) + "\n" for number in range(160)))
    words = ("--input", str(questions), "--output", str(answers), "--media-root", str(PICTURES), "--resume", *SMALL)
    job_id = submit(DEMO, "--", "generate", *words, env=token.environment).stdout.strip()
    client = JobClient(token.url, "--address")
    enough = random.Random().randrange(10, 80)
    wait_until(
        lambda: (
            (answers.exists() and answers.read_bytes().count(b"\n") >= enough)
            or client.details(job_id).status.is_terminal()
        ),
        "no answers come",
    )
    (driver,) = _processes_with(str(answers))
    os.kill(driver, signal.SIGKILL)
    wait_until(lambda: client.details(job_id).status.is_terminal(), "the job does not end")
    assert client.details(job_id).status == "FAILED"
    num_before = answers.read_bytes().count(b"\n")
    assert enough <= num_before < 160
    done = submit("--wait", DEMO, "--", "generate", *words, env=token.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(answer["id"] for answer in lines_of(answers)) == sorted(f"q{number}" for number in range(160))
    assert f"{160 - num_before} lines answered" in done.stdout


def wait_until(condition: Any, what: str, timeout_s: float = 90.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def _await_ready(url: str, details: Any) -> None:
    def ready() -> bool:
        assert not details().status.is_terminal(), details().message
        try:
            return httpx.get(f"{url}/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    wait_until(ready, "the server does not come up")


def _processes_with(word: str) -> list[int]:
    """The processes that have it among their arguments, this one's children apart."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if word.encode() in words:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((DEMO,), "a command is missing: dist-vlm submit"),
        ((DEMO, "--", "bench"), "'bench' cannot be submitted: must be one of serve, generate, check"),
        ((DEMO, "--", "serve", "--config", "x.yaml"), "is given by submit itself"),
        ((DEMO, "--", "serve", "--api-key=x"), "--api-key would stand in the job's log: set DIST_VLM_API_KEY"),
        ((DEMO, "--", "generate", "--input", "/q.jsonl"), "--input needs --output FILE, where the answers go"),
        ((DEMO, "--", "generate", "--prompt", "x", "--temperature=-3"), "temperature"),
        ((DEMO, "--", "serve", "--prot", "1"), "unknown flag --prot; the nearest is --port"),
        ((DEMO, "--", "serve", "--port", "x"), "--port = 'x': must be an integer"),
        (
            (DEMO, "--", "serve", "--device", "auto"),
            "--device = 'auto': must be cpu or cuda in a submitted launch",
        ),
        (
            (DEMO, "--", "serve", "--device", "cpu", "--model", "./here"),
            "--model = './here': must be an absolute",
        ),
        (
            (DEMO, "--", "generate", "--device", "cpu", "--input", "/q.jsonl", "--output", "a.jsonl"),
            "--output = 'a.jsonl': must be an absolute path on storage that outlives the job",
        ),
        (
            (DEMO, "--", "generate", "--device", "cpu", "--prompt", "x", "--image", "p.png"),
            "--image = 'p.png': must be an absolute path that the cluster sees",
        ),
        (
            (DEMO, "--working-dir", "/nowhere", "--", "check", "--device", "cpu"),
            "--working-dir = '/nowhere'",
        ),
        ((DEMO, "--env", "1X=2", "--", "check", "--device", "cpu"), "--env = '1X': must be NAME=VALUE"),
        ((DEMO, "--job-id", "a/b", "--", "check", "--device", "cpu"), "--job-id = 'a/b': must be letters, digits"),
        ((DEMO, "--address", "auto", "--", "check", "--device", "cpu"), "--address = 'auto': must be http://HOST"),
        ((DEMO, "--dry-run", "--address", "http://x:1"), "--address goes with a job, and --dry-run sends none"),
        (("/missing.yaml", "--", "check"), "/missing.yaml: cannot be read"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["submit", *words]) == 2
    assert message in capsys.readouterr().err


def test_where_no_cluster_answers(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    began = time.monotonic()
    assert cli.main(["submit", "--address", url, DEMO, "--", "check", "--device", "cpu"]) == 1
    assert f"no Ray cluster with a dashboard answers at {url} (--address)" in capsys.readouterr().err
    assert time.monotonic() - began < 20
