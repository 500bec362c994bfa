"""The core's process as its socket sees it: it ends with its front, at any moment, and answers only what it knows."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_vlm.config import EngineConfig
from dist_vlm.engine import core_messages as messages
from dist_vlm.engine.process_client import PROGRAM
from dist_vlm.workers.frames import receive_frame, send_frame
from dist_vlm.workers.plan import SamplingRow

END_S = 5.0

# The real program, with ranks that take a minute to start and leave a mark when they are shut down.
SLOW_START = """
import pathlib, sys, time
from dist_vlm.engine import core_process
from dist_vlm.engine.make_core import make_core
from dist_vlm.executor.fake import FakeExecutor

class Slow(FakeExecutor):
    def start(self):
        pathlib.Path({mark!r}).write_text("starting")
        time.sleep(60)

    def shutdown(self):
        pathlib.Path({mark!r}).write_text("shut down")

core_process.make_core = lambda config: make_core(config, Slow())
core_process.main()
"""

FRONT = """
import json, sys, threading, time
from dist_vlm.config import EngineConfig
from dist_vlm.engine.process_client import ProcessClient
client = ProcessClient(EngineConfig.from_fields(**json.loads(sys.argv[1])))
client.start(lambda outputs: None)
print(client.pid, flush=True)
time.sleep(60)
"""


class Process:
    """The program at the other end of `connection`."""

    def __init__(self, *program: str, folder: Path) -> None:
        self.connection, theirs = socket.socketpair()
        self.connection.settimeout(30)
        with theirs:
            self.popen = subprocess.Popen(
                [sys.executable, *(program or PROGRAM), str(theirs.fileno()), str(folder)],
                pass_fds=(theirs.fileno(),),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

    def send(self, message: messages.Message) -> None:
        send_frame(self.connection, messages.pack(message))

    def receive(self) -> messages.Message:
        return messages.unpack(receive_frame(self.connection))

    def end(self) -> tuple[int, str, str]:
        """Its exit code and what it printed on standard output and standard error, once it has ended by itself."""
        out, err = self.popen.communicate(timeout=END_S)
        return self.popen.returncode, out, err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """For the process's temporary files."""
    made = tmp_path / "temporary"
    made.mkdir()
    return made


@pytest.fixture
def make_process(folder: Path) -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def make(*program: str) -> Process:
        made.append(Process(*program, folder=folder))
        return made[-1]

    yield make
    for process in made:
        process.connection.close()
        process.popen.kill()
        process.popen.communicate()


@pytest.fixture
def configure(engine_config: EngineConfig) -> messages.Configure:
    return messages.Configure(json.dumps(engine_config.fields()))


def add(name: str) -> messages.Add:
    return messages.Add(name, (1, 2, 3), (), SamplingRow(), 100, (), 0, "", (), 0)


def test_it_ends_when_its_front_leaves_with_requests_in_flight(
    make_process: Callable[..., Process], configure: messages.Configure, folder: Path
) -> None:
    process = make_process()
    process.send(configure)
    assert isinstance(process.receive(), messages.Started)
    process.send(add("a"))
    assert isinstance(process.receive(), messages.Outputs)
    process.connection.close()
    assert process.end() == (0, "", "")
    assert not folder.exists(), "nobody else may be there to remove it"


def test_it_ends_when_its_front_leaves_before_the_first_message(make_process: Callable[..., Process]) -> None:
    process = make_process()
    process.connection.close()
    assert process.end() == (0, "", "")


def test_a_front_that_leaves_during_a_start_ends_it_and_the_ranks(
    make_process: Callable[..., Process], configure: messages.Configure, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    process = make_process("-c", SLOW_START.format(mark=str(mark)))
    process.send(configure)
    until(mark.exists)
    process.connection.close()
    assert process.end() == (0, "", "")
    assert mark.read_text() == "shut down"


def test_a_request_to_end_is_left_to_the_front(
    make_process: Callable[..., Process], configure: messages.Configure
) -> None:
    process = make_process()
    process.send(configure)
    assert isinstance(process.receive(), messages.Started)
    process.popen.send_signal(signal.SIGTERM)
    process.send(add("a"))
    assert isinstance(process.receive(), messages.Outputs)
    process.connection.close()
    assert process.end() == (0, "", "")


@pytest.mark.parametrize(
    "frame", [b"\xff", messages.pack(messages.Configure("{}")), messages.pack(messages.Failure("a", "b", None))]
)
def test_what_a_front_does_not_say_ends_it(
    make_process: Callable[..., Process], configure: messages.Configure, frame: bytes
) -> None:
    process = make_process()
    process.send(configure)
    assert isinstance(process.receive(), messages.Started)
    send_frame(process.connection, frame)
    code, out, err = process.end()
    assert (code, out) == (0, "")
    assert "the front's messages cannot be read" in err


def test_it_begins_with_a_configuration_or_not_at_all(make_process: Callable[..., Process]) -> None:
    process = make_process()
    process.send(messages.Abort("a"))
    code, _, err = process.end()
    assert code == 1
    assert "Abort in place of Configure" in err


def test_a_wrong_configuration_is_told_by_name(make_process: Callable[..., Process]) -> None:
    process = make_process()
    process.send(messages.Configure('{"model": "m", "max_num_seqz": 3}'))
    told = process.receive()
    assert isinstance(told, messages.Failure)
    assert (told.stage, told.rank) == ("", None)
    assert "max_num_seqz" in told.cause
    assert process.end() == (0, "", "")


def test_its_standard_output_is_not_the_fronts(
    make_process: Callable[..., Process], configure: messages.Configure
) -> None:
    process = make_process(
        "-c", "import dist_vlm.engine.core_process as p; p.CoreProcess.run = lambda self: print('noise'); p.main()"
    )
    assert process.end() == (0, "", "noise\n")


def test_it_ends_with_a_front_that_is_killed(engine_config: EngineConfig) -> None:
    front = subprocess.Popen(
        [sys.executable, "-c", FRONT, json.dumps(engine_config.fields())], stdout=subprocess.PIPE, text=True
    )
    assert front.stdout is not None
    with front:
        pid = int(front.stdout.readline())
        os.kill(pid, 0)
        front.kill()
    until(lambda: not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text())


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + END_S
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)
