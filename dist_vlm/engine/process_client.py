"""The front's end of a core that runs in a process of its own."""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue

from dist_vlm.config import EngineConfig
from dist_vlm.engine import core_messages as messages
from dist_vlm.engine.child_session import reap
from dist_vlm.engine.core_client import SHUT_DOWN, CoreClient
from dist_vlm.engine.messages import EngineRequest
from dist_vlm.engine.question import Question
from dist_vlm.executor.base import ExecutorError, ExecutorInfo, StartError
from dist_vlm.executor.ray_cluster import import_root
from dist_vlm.workers import wire
from dist_vlm.workers.frames import receive_frame, send_frame

_log = logging.getLogger(__name__)

# -P: nothing in the working directory takes the place of a module.
PROGRAM = ("-P", "-m", "dist_vlm.engine.core_process")

_STAGE = "engine process"
# What the process may take on top of start_timeout_s, which bounds the start of the ranks: its own imports.
_IMPORT_S = 60.0
# How long the process has to end its ranks before it is killed; its ranks then go with it.
_END_S = 20.0
_EXIT_CODE_WAIT_S = 1.0


class ProcessClient(CoreClient):
    """Starts `dist_vlm.engine.core_process` and speaks with it over a socket pair, which nobody else can reach.

    config: resolved. program: what the interpreter is given to start the process; the socket's descriptor and a
        directory for temporary files are appended.
    """

    def __init__(self, config: EngineConfig, *, program: Sequence[str] = PROGRAM) -> None:
        super().__init__()
        self._config = config
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: str | None = None
        self._connection: socket.socket | None = None
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._reaping = threading.Lock()
        self._ending = threading.Lock()
        self._closing = False
        self._silences: Question[tuple[float, ...]] = self._question(self._ask_silence)

    @property
    def pid(self) -> int | None:
        """The process's id, None before the start."""
        return None if self._process is None else self._process.pid

    def abort(self, request_id: str) -> None:
        self._outbox.put(messages.pack(messages.Abort(request_id)))

    def silence(self) -> Future[tuple[float, ...]]:
        return self._silences.ask()

    def shutdown(self) -> None:
        atexit.unregister(self.shutdown)
        self._closing = True
        self._close(SHUT_DOWN)
        with self._ending:
            if self._connection is not None:
                with suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)
            self._outbox.put(None)
            if self._process is not None and self._reap(_END_S) is None:
                _log.error("the engine's process %d did not end in %g s; it is killed", self._process.pid, _END_S)
                self._process.kill()
                self._reap(_END_S)
            if self._folder is not None:
                # Empty, unless the process was killed.
                shutil.rmtree(self._folder, ignore_errors=True)
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join(_END_S)
            if self._connection is not None:
                self._connection.close()

    def _start(self) -> ExecutorInfo:
        if self._process is not None:
            raise ExecutorError("start", "the engine's process was started before")
        try:
            self._connection = connection = self._spawn()
            info = self._await_start(connection)
        except BaseException:
            self.shutdown()
            raise
        atexit.register(self.shutdown)
        for target in (self._write, self._read):
            self._threads.append(threading.Thread(target=target, name=f"engine{target.__name__}", daemon=True))
            self._threads[-1].start()
        return info

    def _spawn(self) -> socket.socket:
        self._folder = tempfile.mkdtemp(prefix="dvlm-")
        ours, theirs = socket.socketpair()
        with theirs:
            # In a session of its own: a Ctrl-C at the terminal is the front's alone to answer, and `reap` needs it.
            self._process = subprocess.Popen(
                [sys.executable, *self._program, str(theirs.fileno()), self._folder],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=_environment(),
                start_new_session=True,
            )
        return ours

    def _await_start(self, connection: socket.socket) -> ExecutorInfo:
        limit = self._config.parallel.start_timeout_s
        connection.settimeout(limit + _IMPORT_S)
        try:
            send_frame(connection, messages.pack(messages.Configure(json.dumps(self._config.fields()))))
            message = messages.unpack(receive_frame(connection))
        except TimeoutError:
            raise StartError(_STAGE, f"not ready {_IMPORT_S:g} s after start_timeout_s = {limit:g}") from None
        except OSError:
            raise StartError(_STAGE, f"{self._end_of_process()} before it was ready") from None
        connection.settimeout(None)
        if isinstance(message, messages.Started):
            return message.info
        if not isinstance(message, messages.Failure):
            raise StartError(_STAGE, f"it began with {type(message).__name__}")
        if not message.stage:
            raise ValueError(message.cause)
        raise StartError(message.stage, message.cause, message.rank)

    def _send_request(self, request: EngineRequest) -> None:
        self._outbox.put(messages.pack(messages.add_message(request)))

    def _ask_state(self) -> None:
        self._outbox.put(messages.pack(messages.AskState()))

    def _ask_silence(self) -> None:
        self._outbox.put(messages.pack(messages.AskSilence()))

    # ------------------------------------------------------ the client's threads

    def _write(self) -> None:
        """Sends what waits in the outbox: whoever puts it there does not wait for the process to take it."""
        assert self._connection is not None
        with suppress(OSError):  # the reader tells of a lost connection
            while (frame := self._outbox.get()) is not None:
                send_frame(self._connection, frame)

    def _read(self) -> None:
        assert self._connection is not None
        try:
            while True:
                self._take(messages.unpack(receive_frame(self._connection)))
        except OSError:
            cause = None
        except Exception as error:
            _log.exception("the engine's messages cannot be read")
            cause = f"the front was broken off by {type(error).__name__}"
        if not self._closing:
            dead = ExecutorError(_STAGE, cause or self._end_of_process())
            _log.error("the engine ended: %s", dead)
            self._close(str(dead), dead)

    def _take(self, message: messages.Message) -> None:
        if isinstance(message, messages.Outputs):
            self._tell([messages.output_of(output) for output in message.outputs])
        elif isinstance(message, messages.State):
            self._states.answer(message.state)
        elif isinstance(message, messages.Silence):
            self._silences.answer(message.seconds)
        elif isinstance(message, messages.Failure):
            dead = ExecutorError(message.stage, message.cause, message.rank)
            self._close(str(dead), dead)
        else:
            raise wire.WireError(f"{type(message).__name__} from the engine")

    def _end_of_process(self) -> str:
        """What became of the process, in words."""
        assert self._process is not None
        name = f"the process {self._process.pid}"
        code = self._reap(_EXIT_CODE_WAIT_S)
        if code is None:
            return f"{name} closed its connection"
        return f"{name} was ended by signal {-code}" if code < 0 else f"{name} ended with exit code {code}"

    def _reap(self, timeout_s: float) -> int | None:
        assert self._process is not None
        with self._reaping:
            return reap(self._process, timeout_s)


def _environment() -> dict[str, str]:
    root = import_root()
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return os.environ | ({"PYTHONPATH": path} if path else {})
