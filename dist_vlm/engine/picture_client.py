"""A picture pool's end of one of its processes."""

from __future__ import annotations

import logging
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_vlm.engine import picture_messages as messages
from dist_vlm.engine.images import PreparedImage
from dist_vlm.executor.base import StageKind
from dist_vlm.executor.ray_cluster import import_root
from dist_vlm.media import PictureError
from dist_vlm.workers import wire
from dist_vlm.workers.coded_pixels import coded_shape

_log = logging.getLogger(__name__)

# -P: nothing in the working directory takes the place of a module.
PROGRAM = ("-P", "-m", "dist_vlm.engine.picture_process")

_KEY = re.compile(r"[0-9a-f]{32}")
_MAX_TEXT_CHARACTERS = 1000
# glibc's malloc gives larger blocks back when they are freed, and keeps this much of the others. Its own limits make
# every buffer of a middle-sized picture a mapping of its own, whose pages cost more than decoding.
_OWN_BLOCK_BYTES, _KEPT_BYTES = 16 << 20, 64 << 20
_END_S = 10.0
_EXIT_CODE_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class PooledImage:
    """width, height: of the decoded picture, in pixels. decode_s, preprocess_s: what each step took."""

    image: PreparedImage
    decode_s: float
    preprocess_s: float
    width: int
    height: int


class ProcessLost(Exception):  # noqa: N818 - what happened to it
    """The process is of no more use. The text says why, of the picture that it had: "decoding it took ..."."""


class PictureClient:
    """Starts `dist_vlm.engine.picture_process` and speaks with it over a socket pair, which nobody else can reach. For
    one thread, but for `abort`.

    configure: what the process is told first. shape: of the pixel values that it must send, coded or not. program: what
        the interpreter is given to start it; the socket's descriptor is appended.
    """

    def __init__(
        self, configure: messages.Configure, *, shape: tuple[int, ...], program: Sequence[str] = PROGRAM
    ) -> None:
        self._configure = configure
        self._forms: dict[StageKind, tuple[tuple[int, ...], np.dtype[Any]]] = {
            "coded_pixels": (coded_shape(shape), np.dtype("u1")),
            "pixel_values": (shape, np.dtype("<f4")),
        }
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                # In a session of its own: a Ctrl-C at the terminal is the server's alone to answer.
                self._process = subprocess.Popen(
                    [sys.executable, *program, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env=environment(),
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        self._connection = ours
        self._channel = messages.PictureChannel(ours)

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def await_ready(self, timeout_s: float) -> None:
        """Raises `RuntimeError` with the cause if the process does not come up in time."""
        try:
            self._channel.start_clock(timeout_s)
            self._channel.send(self._configure)
            message = self._channel.receive()
        except TimeoutError:
            raise RuntimeError(f"a picture process was not ready after {timeout_s:.0f} s") from None
        except (OSError, wire.WireError):
            raise RuntimeError(f"a picture process {self._end()} before it was ready") from None
        if isinstance(message, messages.Broken):
            raise RuntimeError(f"a picture process cannot serve: {message.cause}")
        if not isinstance(message, messages.Ready):
            raise RuntimeError(f"a picture process began with {type(message).__name__}")

    def prepare(self, source: str | bytes, *, name: str, timeout_s: float) -> PooledImage:
        """source: a data: URL, or a picture file. Raises `PictureError` if the process refuses it, and `ProcessLost` if
        there is no answer in time, or no right one."""
        try:
            self._channel.start_clock(timeout_s)
            self._channel.send(messages.Decode(name, isinstance(source, str), len(source)), source)
            return self._receive()
        except TimeoutError:
            raise ProcessLost(f"decoding it took longer than {timeout_s:g} s and was given up") from None
        except OSError:
            raise ProcessLost(f"the process that decoded it {self._end()}") from None
        except wire.WireError:
            _log.exception("the answer of picture process %d cannot be read", self.pid)
            raise ProcessLost("the process that decoded it gave no right answer") from None

    def abort(self) -> None:
        """Ends the process, from any thread; who waits for its answer is told that it is lost."""
        self._process.kill()
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the process, and waits for it."""
        self.abort()
        self._connection.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            _log.error("picture process %d does not end", self.pid)

    def _receive(self) -> PooledImage:
        message = self._channel.receive()
        if isinstance(message, messages.Refused):
            raise PictureError(message.text[:_MAX_TEXT_CHARACTERS])
        if not isinstance(message, messages.Prepared):
            raise wire.WireError(f"{type(message).__name__} in place of an answer")
        kind: StageKind = "coded_pixels" if message.kind == "coded_pixels" else "pixel_values"
        shape, dtype = self._forms[kind]
        if (message.kind, message.shape) != (kind, shape) or not _KEY.fullmatch(message.key):
            told = f"{message.kind[:40]!r} of shape {message.shape} under the key {message.key[:40]!r}"
            raise wire.WireError(told)
        data = bytearray(dtype.itemsize * math.prod(shape))
        self._channel.receive_into(memoryview(data))
        array = np.frombuffer(data, dtype).astype(dtype.newbyteorder("="), copy=False).reshape(shape)
        image = PreparedImage(message.key, kind, array)
        return PooledImage(image, message.decode_s, message.preprocess_s, message.width, message.height)

    def _end(self) -> str:
        """What became of the process, in words."""
        try:
            code = self._process.wait(_EXIT_CODE_WAIT_S)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def environment() -> dict[str, str]:
    """Of a picture process: this one's, but for one thread in each library, and a malloc told what to keep."""
    path = os.pathsep.join(filter(None, [import_root(), os.environ.get("PYTHONPATH")]))
    own = {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(_OWN_BLOCK_BYTES),
        "MALLOC_TRIM_THRESHOLD_": str(_KEPT_BYTES),
        # That torch is missing, which is on purpose.
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }
    return os.environ | own | ({"PYTHONPATH": path} if path else {})
