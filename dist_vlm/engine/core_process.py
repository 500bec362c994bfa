"""The engine core as a process of its own: what runs at the other end of a `ProcessClient`'s socket.

    python -m dist_vlm.engine.core_process DESCRIPTOR DIRECTORY

DESCRIPTOR is the socket's, DIRECTORY is for temporary files: who started the process removes what it could not. The
process ends, and its ranks with it, when the front closes the socket or dies. A SIGTERM is the front's to answer: who
ends a job sends it to every process of it, and the front still has requests to finish.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from concurrent.futures import Future
from contextlib import suppress
from types import FrameType

from dist_vlm.config import EngineConfig
from dist_vlm.engine import core_messages as messages
from dist_vlm.engine.core_loop import CoreLoop
from dist_vlm.engine.make_core import make_core
from dist_vlm.engine.messages import EngineOutput
from dist_vlm.engine.state import EngineState
from dist_vlm.executor.base import ExecutorError
from dist_vlm.workers import wire
from dist_vlm.workers.failure import describe
from dist_vlm.workers.frames import receive_frame, send_frame

# To this process itself: ends the start that its main thread is in.
_BREAK_OFF = signal.SIGUSR1

_log = logging.getLogger(__name__)


class CoreProcess:
    """Serves one front over one socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._settled = threading.Event()
        self._told_death = False
        self._loop: CoreLoop | None = None

    def run(self) -> None:
        """From the front's `Configure` until it leaves."""
        message = messages.unpack(receive_frame(self._connection))
        if not isinstance(message, messages.Configure):
            raise wire.WireError(f"{type(message).__name__} in place of Configure")
        # Read by a thread of its own, so that a front that leaves during a start is noticed.
        reader = threading.Thread(target=self._read, name="front", daemon=True)
        reader.start()
        try:
            if self._start(message):
                reader.join()
        finally:
            signal.signal(_BREAK_OFF, signal.SIG_IGN)  # it would break off what ends the ranks
            if self._loop is not None:
                self._loop.shutdown()

    def _start(self, configure: messages.Configure) -> bool:
        """Starts the engine and tells the front how that went."""
        outcome: messages.Message
        try:
            self._loop = CoreLoop(make_core(EngineConfig.from_fields(**json.loads(configure.fields))))
            outcome = messages.Started(self._loop.start(self._send_outputs))
        except ExecutorError as error:
            outcome = messages.Failure(error.stage, error.cause, error.rank)
        except ValueError as error:
            outcome = messages.Failure("", str(error), None)
        except Exception as error:
            _log.exception("the engine did not start")
            outcome = messages.Failure("start", describe(error), None)
        self._settled.set()
        self._send(outcome)
        return isinstance(outcome, messages.Started)

    # ------------------------------------------------------ the reader's thread

    def _read(self) -> None:
        try:
            while True:
                self._obey(messages.unpack(receive_frame(self._connection)))
        except OSError:  # the front has left, or this end is closed
            pass
        except Exception:
            _log.exception("the front's messages cannot be read")
        if not self._settled.is_set():
            os.kill(os.getpid(), _BREAK_OFF)

    def _obey(self, message: messages.Message) -> None:
        if self._loop is None or not self._settled.is_set():
            raise wire.WireError(f"{type(message).__name__} before the engine has started")
        if isinstance(message, messages.Add):
            self._loop.add(messages.request_of(message))
        elif isinstance(message, messages.Abort):
            self._loop.abort(message.request_id)
        elif isinstance(message, messages.AskState):
            self._loop.state().add_done_callback(self._send_state)
        elif isinstance(message, messages.AskSilence):
            self._loop.silence().add_done_callback(self._send_silence)
        else:
            raise wire.WireError(f"{type(message).__name__} from the front")

    def _send_silence(self, reply: Future[tuple[float, ...]]) -> None:
        if reply.exception() is None:  # else the front is told of the end by itself
            self._send(messages.Silence(reply.result()))

    # ------------------------------------------------------- the loop's thread

    def _send_outputs(self, outputs: list[EngineOutput]) -> None:
        dead = self._loop.dead if self._loop is not None else None
        if dead is not None and not self._told_death:
            self._told_death = True
            self._send(messages.Failure(dead.stage, dead.cause, dead.rank))
        if outputs:
            self._send(messages.Outputs(tuple(messages.output_message(output) for output in outputs)))

    def _send_state(self, reply: Future[EngineState]) -> None:
        if reply.exception() is None:  # as above
            self._send(messages.State(reply.result()))

    def _send(self, message: messages.Message) -> None:
        frame = messages.pack(message)
        with self._sending, suppress(OSError):  # a front that has left: the reader learns of it
            send_frame(self._connection, frame)


def main() -> None:
    signal.signal(_BREAK_OFF, _leave)
    signal.signal(signal.SIGTERM, _go_on)
    tempfile.tempdir = sys.argv[2]
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        # No process started from here may keep the socket open: its end is how the front learns of ours.
        connection.set_inheritable(False)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # standard output is the front's
        with suppress(ConnectionError):
            CoreProcess(connection).run()
    with suppress(OSError):
        os.rmdir(sys.argv[2])  # the front may be gone


def _go_on(signum: int, frame: FrameType | None) -> None:
    """Not SIG_IGN, which the processes that are started from here would inherit."""


def _leave(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    main()
