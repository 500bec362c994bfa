"""How the measuring ranks are started, and what becomes of one that fails."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dist_vlm.launch import collective_ranks
from dist_vlm.launch.collective_rank import RankJob
from dist_vlm.launch.collective_ranks import MeasureError, measure

JOB: dict[str, Any] = {"hidden_size": 64, "columns": 8, "dtype": "bfloat16", "row_counts": [1, 2]}
FOUND = {"device": "Some GPU", "link_bytes_per_s": 2e11, "times": []}


@pytest.fixture
def started(monkeypatch) -> list[subprocess.Popen[str]]:
    """The processes that a test starts."""
    processes: list[subprocess.Popen[str]] = []
    real = collective_ranks._start

    def start(job, errors):
        processes.append(real(job, errors))
        return processes[-1]

    monkeypatch.setattr(collective_ranks, "_start", start)
    return processes


def scripted(monkeypatch, tmp_path: Path, body: str) -> tuple[list[subprocess.Popen[str]], list[RankJob]]:
    """Ranks that run `body` in place of the program; `job` is what they were told."""
    processes: list[subprocess.Popen[str]] = []
    jobs: list[RankJob] = []
    joined = repr(str(tmp_path / "joined"))
    code = f"import json, os, sys, time\njob = json.loads(sys.argv[1])\njoined = {joined}\n{body}"

    def start(job, errors):
        jobs.append(job)
        command = [sys.executable, "-S", "-c", code, job.line()]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True))
        return processes[-1]

    monkeypatch.setattr(collective_ranks, "_start", start)
    return processes, jobs


def test_a_program_that_finds_no_gpu_is_an_error_with_its_own_words(monkeypatch, started) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    began = time.monotonic()
    with pytest.raises(MeasureError) as error:
        measure(world_size=2, **JOB)
    assert time.monotonic() - began < 90
    assert len(str(error.value)) <= 2000
    said = str(error.value).splitlines()
    assert any("set_device" in line for line in said)
    assert "Error" in said[-1] or "CUDA" in str(error.value)
    assert len(started) == 1, "the others are not started for nothing"
    assert started[0].poll() == 1


# Rank 0 has an answer when another has joined it.
ANSWER = f"""
if job["rank"] == 0:
    print(4321, flush=True)
    while not os.path.exists(joined):
        time.sleep(0.01)
    print("a warning of some library")
    print("measured: " + {json.dumps(json.dumps(FOUND))}, flush=True)
    print("and its last words", flush=True)
else:
    open(joined, "w").close()
"""


def test_every_rank_is_told_its_part_and_rank_0_answers(monkeypatch, tmp_path) -> None:
    processes, jobs = scripted(monkeypatch, tmp_path, ANSWER)
    assert measure(world_size=3, others=True, **JOB) == FOUND
    assert [(job.rank, job.world_size, job.port) for job in jobs] == [(0, 3, 0), (1, 3, 4321), (2, 3, 4321)]
    for job in jobs:
        assert (job.hidden_size, job.columns, job.dtype, job.row_counts, job.others) == (
            64,
            8,
            "bfloat16",
            [1, 2],
            True,
        )
        assert RankJob(**json.loads(job.line())) == job
    assert [process.poll() for process in processes] == [0, 0, 0]


def test_a_rank_that_fails_later_gives_its_status_and_last_words(monkeypatch, tmp_path) -> None:
    fails = """
if job["rank"] == 1:
    print("x" * 5000 + "the last words", file=sys.stderr)
    sys.exit(3)
"""
    processes, _ = scripted(monkeypatch, tmp_path, ANSWER + fails)
    with pytest.raises(MeasureError, match=r"exit statuses \[0, 3\]: x+the last words$") as error:
        measure(world_size=2, **JOB)
    assert len(str(error.value)) < 2100
    assert all(process.poll() is not None for process in processes)


def test_ranks_that_do_not_end_are_ended(monkeypatch, tmp_path) -> None:
    hangs = """
print(4321, flush=True)
print(f"rank {job['rank']} waits", file=sys.stderr, flush=True)
time.sleep(600)
"""
    processes, _ = scripted(monkeypatch, tmp_path, hangs)
    began = time.monotonic()
    with pytest.raises(MeasureError, match=r"not done within 1\.5 s: ") as error:
        measure(world_size=2, timeout_s=1.5, **JOB)
    assert time.monotonic() - began < 30
    assert "rank 0 waits" in str(error.value)
    assert [process.poll() for process in processes] == [-9, -9]


def test_a_first_line_that_is_no_port_is_an_error(monkeypatch, tmp_path) -> None:
    processes, jobs = scripted(monkeypatch, tmp_path, 'print("no port", flush=True)\nprint("why not", file=sys.stderr)')
    with pytest.raises(MeasureError):
        measure(world_size=2, **JOB)
    assert len(jobs) == 1
    assert processes[0].poll() is not None
