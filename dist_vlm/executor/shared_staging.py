"""Images on their way to ranks on the driver's machine: each is written into memory once, of which every rank gets a
descriptor through a socket; it copies what is there and answers. That takes a fraction of a call through Ray, which
serializes an image and copies it several times.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dist_vlm.executor.base import StagedImage, StageKind
from dist_vlm.executor.rank_sockets import connect_ranks
from dist_vlm.executor.staging import GROUP
from dist_vlm.executor.transport import TransportClosedError
from dist_vlm.workers import wire
from dist_vlm.workers.failure import describe
from dist_vlm.workers.take_images import MESSAGE_BYTES, ImageAnswer, ImageCall

# Calls that may be unanswered, and those of them that bring an image; further ones wait here. So few fit into a socket
# whatever a rank does, and images on their way hold few descriptors.
_WINDOW, _IMAGES = 64, 16
# Keys of a call to forget; more would not fit a message.
_MOST_FORGOTTEN = 100
# Pieces of memory that are kept for further images: what is there already is written in a third of the time.
_KEPT = 4

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Call:
    """key, kind: of the image to be staged. array: it, as long as it is not sent.
    memory: where it is from then on, until every rank has answered.
    forget: keys of images to be forgotten instead; more may be added until it is sent.
    """

    key: str = ""
    kind: str = ""
    array: np.ndarray | None = None
    memory: _Memory | None = None
    forget: list[str] = field(default_factory=list)

    def message(self) -> ImageCall:
        array = self.array
        if array is None:
            return ImageCall(forget=tuple(self.forget))
        return ImageCall(self.key, self.kind, str(array.dtype), array.shape)


class _Memory:
    """Memory without a name, which is gone with the last process that has a descriptor of it."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("image", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor)

    def write(self, array: np.ndarray) -> None:
        """From its beginning. Raises `OSError`."""
        data, num_written = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, 0
        while num_written < data.nbytes and (count := os.pwrite(self.descriptor, data[num_written:], num_written)):
            num_written += count
        if num_written != data.nbytes:
            raise OSError(errno.ENOSPC, f"{num_written} of {data.nbytes} bytes could be written")


class SharedStaging:
    """As `ImageStaging`, through one socket a rank, in which calls and answers keep their order. Nothing blocks, `wait`
    apart.

    `stage`, `poll`, `unstage` and `advance` raise `TransportClosedError` where a rank is gone or this was closed.
    """

    def __init__(self, actors: Sequence[Any]) -> None:
        self._staged: dict[str, _Call] = {}
        self._ended: dict[str, StagedImage] = {}
        self._free: list[_Memory] = []
        self._unsent: deque[_Call] = deque()
        self._unanswered: deque[_Call] = deque()
        self._answers: list[deque[ImageAnswer]] = [deque() for _ in actors]
        self._connections = connect_ranks(
            lambda path, token: [
                actor.take_images.options(concurrency_group=GROUP).remote(path, token) for actor in actors
            ],
            kind=socket.SOCK_SEQPACKET,
            receive=lambda connection: connection.recv(MESSAGE_BYTES),
        )
        for connection in self._connections:
            connection.setblocking(False)

    def stage(self, key: str, kind: StageKind, array: np.ndarray) -> None:
        if key in self._staged:
            raise ValueError(f"image {key!r} is staged already")
        call = _Call(key, kind, array)
        self._staged[key] = call
        self._unsent.append(call)
        self._advance()

    def poll(self) -> list[StagedImage]:
        """Images that every rank has answered for since the last call, and those that could not be sent."""
        self._advance()
        images, self._ended = list(self._ended.values()), {}
        return images

    def unstage(self, key: str) -> None:
        if key not in self._staged:
            raise ValueError(f"image {key!r} is not staged")
        call = self._staged.pop(key)
        self._ended.pop(key, None)
        if call in self._unsent:
            self._unsent.remove(call)
        elif call.array is None:  # it was sent
            last = self._unsent[-1] if self._unsent else None
            if last is None or not 0 < len(last.forget) < _MOST_FORGOTTEN:
                self._unsent.append(last := _Call())
            last.forget.append(key)
        self._advance()

    def advance(self) -> None:
        """Sends what waits for room; for whoever has nothing to stage, and does not poll."""
        if self._unsent:
            self._advance()

    def wait(self, timeout_s: float) -> None:
        """Until `poll` may have something to tell, or so long."""
        if self._ended:
            return
        ready = select.poll()
        with suppress(OSError, ValueError):  # closed meanwhile, which the next call tells
            for connection, answers in zip(self._connections, self._answers, strict=True):
                if not answers:
                    ready.register(connection, select.POLLIN)
            ready.poll(1000 * timeout_s)

    def close(self) -> None:
        """From any thread."""
        for connection in self._connections:
            connection.close()

    def _advance(self) -> None:
        """Takes the answers that are there, then sends what may be sent."""
        for connection, answers in zip(self._connections, self._answers, strict=True):
            answers.extend(_received(connection))
        while self._unanswered and all(self._answers):
            self._end(self._unanswered.popleft(), [answers.popleft().cause for answers in self._answers])
        num_images = sum(call.memory is not None for call in self._unanswered)
        while self._unsent and len(self._unanswered) < _WINDOW:
            if self._unsent[0].array is not None:
                if num_images == _IMAGES:
                    break
                num_images += 1
            self._send(self._unsent.popleft())

    def _end(self, call: _Call, causes: Sequence[str]) -> None:
        if call.memory is not None and len(self._free) < _KEPT:
            self._free.append(call.memory)
        call.memory = None
        error = next((f"rank {rank}: {cause}" for rank, cause in enumerate(causes) if cause), None)
        if self._staged.get(call.key) is call:
            self._ended[call.key] = StagedImage(call.key, error)
        elif error is not None and call.forget:
            _log.error("images could not be unstaged: %s", error)

    def _send(self, call: _Call) -> None:
        message = wire.encode(call.message())
        if call.array is not None:
            try:
                memory = self._free.pop() if self._free else _Memory()
                memory.write(call.array)
            except OSError as error:
                self._ended[call.key] = StagedImage(call.key, describe(error))
                return
            call.array, call.memory = None, memory
        descriptors = [] if call.memory is None else [call.memory.descriptor]
        try:
            for connection in self._connections:
                socket.send_fds(connection, [message], descriptors)
        except OSError as error:
            raise TransportClosedError(describe(error)) from None
        self._unanswered.append(call)


def _received(connection: socket.socket) -> Iterator[ImageAnswer]:
    """Of what a rank answers, what is there."""
    try:
        while message := connection.recv(MESSAGE_BYTES):
            yield wire.decode(ImageAnswer, message)
    except BlockingIOError:
        return
    except OSError as error:
        raise TransportClosedError(describe(error)) from None
    raise TransportClosedError("a rank closed its connection for images")
