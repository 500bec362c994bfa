"""The processes that work ahead of the ranks: when they are started, how they end, and that nothing depends on them."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stand_in import RUNNER, rank_config

from dist_vlm.executor import ahead
from dist_vlm.executor.ahead import AheadProcess, is_wanted, reads
from dist_vlm.executor.ray import RayExecutor
from dist_vlm.workers.config import RankConfig


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Ended and not yet collected counts as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("changes", "address", "expected"),
    [
        ({}, None, True),
        ({}, "local", True),
        ({}, "auto", False),
        ({}, "10.0.0.1:6379", False),
        ({"kernels": "torch"}, None, False),
        ({"device": "cpu"}, None, False),
    ],
)
def test_it_is_wanted_for_triton_on_gpus_of_this_machine(
    changes: dict[str, str], address: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = rank_config(**({"device": "cuda", "kernels": "triton"} | changes))
    assert is_wanted(config, ray_address=address) is expected
    assert reads(config, ray_address=address) is (expected or "kernels" in changes)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not is_wanted(config, ray_address=None)
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not is_wanted(config, ray_address=address)


def test_the_command_tells_the_configuration() -> None:
    config = rank_config(2, kv_cache_bytes=7)
    *_, option, module, told = ahead.command(config)
    assert (option, module) == ("-m", "dist_vlm.workers.compile_ahead")
    assert RankConfig(**json.loads(told)) == config


def test_reading_ends_by_itself_or_when_it_is_stopped() -> None:
    *_, module, parent = ahead.reading_command()
    assert (module, int(parent)) == ("dist_vlm.workers.read_ahead", os.getpid())
    process = AheadProcess(ahead.reading_command(), "reading ahead")
    time.sleep(1.0)
    assert process.is_running, "it ended while this process is there"
    process.stop()
    assert not process.is_running


def test_stopping_ends_it_and_what_it_has_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    process = AheadProcess(["bash", "-c", f"sleep 1000 & echo $! > {note}.new; mv {note}.new {note}; wait"])
    until(note.exists)
    assert process.is_running and is_alive(int(note.read_text()))
    process.stop()
    until(lambda: not is_alive(int(note.read_text())))
    assert not process.is_running
    process.stop()


def test_stopping_ends_children_that_outlived_it(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    process = AheadProcess(["bash", "-c", f"sleep 1000 & echo $! > {note}"])
    until(lambda: note.exists() and note.read_text() != "")
    process.stop()
    until(lambda: not is_alive(int(note.read_text())))


def test_only_a_failure_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    fine = AheadProcess(["bash", "-c", "echo chatter >&2"])
    until(lambda: not fine.is_running)
    assert not caplog.records
    failing = AheadProcess(["bash", "-c", "echo no compiler >&2; exit 3"])
    until(lambda: not failing.is_running)
    absent = AheadProcess(["/nowhere/python"])
    assert not absent.is_running
    absent.stop()
    first, second = (record.getMessage() for record in caplog.records)
    assert "status 3" in first and first.endswith("no compiler")
    assert "/nowhere/python" in second


def test_it_runs_in_its_own_session_and_finds_this_package(tmp_path: Path) -> None:
    note = tmp_path / "note"
    code = f"import os, dist_vlm.version; open({str(note)!r}, 'w').write(str(os.getsid(0)))"
    process = AheadProcess([*ahead.command(rank_config())[:1], "-c", code])
    until(lambda: not process.is_running)
    assert int(note.read_text()) != os.getsid(0)


@pytest.mark.usefixtures("shared_ray")
class TestExecutor:
    def executor(self, words: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> RayExecutor:
        if words is not None:
            monkeypatch.setattr(ahead, "is_wanted", lambda config, ray_address: True)
            monkeypatch.setattr(ahead, "command", lambda config: words)
            monkeypatch.setattr(ahead, "reads", lambda config, ray_address: True)
            monkeypatch.setattr(ahead, "reading_command", lambda: ["sleep", "1000"])
        return RayExecutor(rank_config(), runner=RUNNER, transport="direct", start_timeout_s=60.0)

    def test_none_is_started_for_a_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        executor = self.executor(None, monkeypatch)
        assert executor.start().num_blocks == 100
        assert executor._ahead is None
        executor.shutdown()

    def test_it_is_not_waited_for_and_ends_at_the_shutdown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        executor = self.executor(["sleep", "1000"], monkeypatch)
        assert executor.start().num_blocks == 100
        process = executor._ahead
        assert process is not None and process.is_running
        executor.shutdown()
        assert not process.is_running

    def test_its_failure_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        executor = self.executor(["false"], monkeypatch)
        assert executor.start().num_blocks == 100
        executor.shutdown()

    def test_it_ends_with_a_start_that_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        executor = self.executor(["sleep", "1000"], monkeypatch)
        made: list[AheadProcess] = []

        def make(words: list[str], task: str = "") -> AheadProcess:
            made.append(AheadProcess(words, task))
            return made[-1]

        monkeypatch.setattr(ahead, "AheadProcess", make)
        monkeypatch.setattr(executor._cluster, "connect", lambda *_, **__: 1 // 0)
        with pytest.raises(Exception, match="ZeroDivisionError"):
            executor.start()
        assert len(made) == 2 and not any(process.is_running for process in made)

    def test_reading_ends_with_the_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        executor = self.executor(["true"], monkeypatch)
        made: list[AheadProcess] = []

        def make(words: list[str], task: str = "") -> AheadProcess:
            made.append(AheadProcess(words, task))
            return made[-1]

        monkeypatch.setattr(ahead, "AheadProcess", make)
        executor.start()
        reading = made[0]
        assert reading._process is not None and reading._process.returncode == -signal.SIGKILL
        executor.shutdown()
