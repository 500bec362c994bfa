"""The picture process as its socket sees it: confined, deaf to what it does not know, and gone with its pool."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_vlm.config import EngineConfig
from dist_vlm.engine import picture_messages as messages
from dist_vlm.engine.picture_client import PROGRAM, environment

START_S, END_S = 60, 5.0
MEMORY_BYTES = 96 << 20


class Process:
    """The program at the other end of `channel`."""

    def __init__(self) -> None:
        self.connection, theirs = socket.socketpair()
        self.channel = messages.PictureChannel(self.connection)
        self.channel.start_clock(START_S)
        with theirs:
            self.popen = subprocess.Popen(
                [sys.executable, *PROGRAM, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

    def configure(self, config: EngineConfig) -> messages.Message:
        self.channel.send(messages.Configure(json.dumps(config.fields()), MEMORY_BYTES, 1 << 20))
        return self.channel.receive()

    def end(self) -> tuple[int, str, str]:
        """Its exit code and what it printed on standard output and standard error, once it has ended by itself."""
        out, err = self.popen.communicate(timeout=END_S)
        return self.popen.returncode, out, err


@pytest.fixture
def make_process() -> Iterator[Callable[[], Process]]:
    made: list[Process] = []

    def make() -> Process:
        made.append(Process())
        return made[-1]

    yield make
    for process in made:
        process.popen.kill()
        process.popen.communicate()
        process.connection.close()


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_it_is_confined_before_the_first_picture_and_ends_with_its_pool(
    make_process: Callable[[], Process], engine_config: EngineConfig
) -> None:
    process = make_process()
    assert process.configure(engine_config) == messages.Ready()
    pid = process.popen.pid
    limits = {name: resource.prlimit(pid, getattr(resource, f"RLIMIT_{name}")) for name in ("CORE", "FSIZE", "NPROC")}
    assert limits == dict.fromkeys(limits, (0, 0))
    assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (32, 32)
    facts = status(pid)
    (soft, hard), size = resource.prlimit(pid, resource.RLIMIT_AS), int(facts["VmSize"].split()[0]) << 10
    assert soft == hard
    assert abs(soft - size - MEMORY_BYTES) < 8 << 20
    assert facts["NoNewPrivs"] == "1"
    assert facts["Threads"] == "1"
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(os.getpriority(os.PRIO_PROCESS, 0) + 5, 19)
    # The image processor is loaded, and torch is not: several of these processes run beside a server.
    assert int(facts["VmRSS"].split()[0]) < 150 << 10
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    process.connection.close()
    assert process.end() == (0, "", "")


def test_a_stranger_that_configures_twice_is_left(
    make_process: Callable[[], Process], engine_config: EngineConfig
) -> None:
    process = make_process()
    process.configure(engine_config)
    process.channel.send(messages.Configure("{}", 1, 1))
    code, _, err = process.end()
    assert code == 1
    assert err.rstrip().endswith("WireError: Configure from the pool")


@pytest.mark.parametrize("message", [messages.Ready(), messages.Decode("it", True, 0)])
def test_nothing_is_done_before_it_is_configured(
    message: messages.Message, make_process: Callable[[], Process]
) -> None:
    process = make_process()
    process.channel.send(message)
    code, _, err = process.end()
    assert code == 1
    assert f"{type(message).__name__} in place of Configure" in err


def test_a_checkpoint_that_cannot_be_read_is_told(
    make_process: Callable[[], Process], tiny_facts: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_facts / "config.json").read_bytes())
    process = make_process()
    answer = process.configure(EngineConfig.from_fields(model=str(tmp_path), device="cpu"))
    assert isinstance(answer, messages.Broken)
    assert "preprocessor_config.json is missing" in answer.cause
    assert process.end()[0] == 0
