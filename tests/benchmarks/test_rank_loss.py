"""The pieces of the program, without a cluster."""

from __future__ import annotations

import asyncio
import mmap
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rank_loss

from dist_vlm import AsyncLLM, EngineConfig
from dist_vlm.config import ConfigError
from dist_vlm.executor.base import ExecutorError
from dist_vlm.executor.fake import FakeExecutor


def test_traffic_notes_how_each_request_ended(tiny_facts: Path) -> None:
    lost = ExecutorError("step", "its process died", 1)
    executor = FakeExecutor(max_model_len=2048, fail_steps={30: lost})
    config = EngineConfig.from_fields(model=str(tiny_facts), device="cpu")

    async def run() -> tuple[rank_loss.Traffic, int]:
        async with AsyncLLM.from_config(config, executor=executor) as llm:
            traffic = rank_loss.Traffic(llm, output_tokens=8)
            running = asyncio.create_task(traffic.run(2))
            await llm.wait_dead()
            in_work = traffic.num_begun - len(traffic.ends)
            traffic.is_over = True
            await asyncio.wait_for(running, 20)
            return traffic, in_work

    traffic, in_work = asyncio.run(run())
    assert len(traffic.ends) == traffic.num_begun
    failed = [end for end in traffic.ends if end.cause]
    # One more may have begun between the end and the news of it.
    assert in_work <= len(failed) <= in_work + 2
    assert {end.cause for end in failed} == {str(lost)}
    finished = [end for end in traffic.ends if not end.cause]
    assert finished and {end.num_tokens for end in finished} == {8}
    assert traffic.news == sorted(traffic.news)


def test_tokens_come_again_after_the_longest_silence() -> None:
    # What was on its way at the kill, at 10, came at 10.1.
    assert rank_loss.again([9.0, 9.9, 10.1, 14.0, 14.1], killed=10.0) == 14.0
    assert rank_loss.again([9.0, 9.9], killed=10.0) is None
    assert rank_loss.ms(14.0, 10.0) == 4000


def traffic_of(*ends: rank_loss.End, news: Sequence[float] = ()) -> Any:
    return SimpleNamespace(ends=list(ends), news=list(news))


def test_an_engine_that_ended_has_named_the_rank_to_everyone() -> None:
    dead = ExecutorError("step", "its process died", 1)
    lost = [rank_loss.End(10.2, 3, str(dead)), rank_loss.End(10.3, 0, str(dead))]
    traffic = traffic_of(rank_loss.End(9.0, 8), *lost, news=[9.0, 9.9])
    found = rank_loss.outcome(traffic, rank=1, killed=10.0, in_work=2, dead=dead, known=10.1)
    assert (found["engine"], found["error"]) == ("ended", "step failed (rank 1): its process died")
    times = {"first_request_failed": 200, "engine_ended": 100, "tokens_again": None, "last_request_ended": 300}
    assert found["ms_from_the_kill"] == {name: ms and pytest.approx(ms) for name, ms in times.items()}
    counts = {"finished_before": 1, "finished_after": 0, "failed": 2, "failed_with_tokens": 1}
    assert found["requests"] == counts | {"causes": {str(dead): 2}}
    assert found["met"] == {"the killed rank is named to everyone": True, "every request ended": True}
    other = rank_loss.outcome(traffic, rank=0, killed=10.0, in_work=3, dead=dead, known=10.1)
    assert other["met"] == {"the killed rank is named to everyone": False, "every request ended": False}


def test_an_engine_that_went_on_has_failed_nobody() -> None:
    traffic = traffic_of(rank_loss.End(9.0, 8), rank_loss.End(15.0, 8), news=[9.0, 9.9, 10.1, 14.0, 15.0])
    found = rank_loss.outcome(traffic, rank=1, killed=10.0, in_work=1, dead=None, known=None)
    assert (found["engine"], found["error"]) == ("went on", None)
    times = {"first_request_failed": None, "engine_ended": None, "tokens_again": 4000, "last_request_ended": 5000}
    assert found["ms_from_the_kill"] == times
    assert found["met"] == {"no request failed": True, "every request ended": True}


def test_processes_and_what_they_share_are_found_until_they_are_gone() -> None:
    name = f"rank-loss-{os.getpid()}"
    path = Path("/dev/shm", name)
    path.write_bytes(bytes(mmap.PAGESIZE))
    wait = f"import mmap; f = open({str(path)!r}, 'r+b'); m = mmap.mmap(f.fileno(), 0); print(1, flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", wait], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"1\n"
        assert child.pid in rank_loss.descendants(os.getpid())
        assert rank_loss.shared_memory_of([child.pid]) == {name}
        (left,) = rank_loss.left_of([child.pid], 0.05)
        assert "-c import mmap" in left
        path.unlink()
        assert rank_loss.shared_memory_of([child.pid]) == set()
        child.kill()
        assert rank_loss.left_of([child.pid], 10) == []
    finally:
        path.unlink(missing_ok=True)
        child.kill()
        child.communicate()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "2", "-tp", "2"], "--rank = 2: must be a rank, below tensor_parallel_size, which is 2"),
        (["--executor", "inline", "--rank", "0"], "parallel.executor = 'inline': must be ray"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny_facts: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rank_loss.main(["--model", str(tiny_facts), "--device", "cpu", *words])
    assert str(caught.value) == message
