"""What a picture pool and its processes send each other, and how it is written.

A message is a frame (`workers/frames.py`) of one byte that names its class, then the class as `workers/wire.py` writes
it: msgpack with a closed schema. Picture files and arrays follow their message as bare bytes: they are not copied into
it and out of it. Nothing is unpickled on either side.
"""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass
from typing import Any, cast

from dist_vlm.workers import wire
from dist_vlm.workers.frames import Disconnected, frame

# Longest message, without what follows it. The other end may be in the hands of a picture.
MAX_MESSAGE_BYTES = 1 << 20
# A text is encoded, and its copy sent, in parts of this size: nothing else runs in Python meanwhile.
_PART_BYTES = 1 << 20
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Configure:
    """The pool's first message. fields: a resolved configuration's flat fields, as JSON. memory_bytes: what decoding
    may take. max_bytes: longest picture file."""

    fields: str
    memory_bytes: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Decode:
    """A picture to prepare; `size` bytes follow: a data: URL, or a file."""

    name: str
    is_url: bool
    size: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The process's first message: it waits for pictures."""


@dataclass(frozen=True, slots=True)
class Broken:
    """The process's first message, if it cannot serve."""

    cause: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """A `PooledImage`; its array follows, in C order: bytes, or float32, little-endian, as its kind says."""

    key: str
    kind: str
    shape: tuple[int, ...]
    decode_s: float
    preprocess_s: float
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A `PictureError`."""

    text: str


Message = Configure | Decode | Ready | Broken | Prepared | Refused

_CLASSES: tuple[type[Any], ...] = (Configure, Decode, Ready, Broken, Prepared, Refused)
_TAGS = {cls: bytes([tag]) for tag, cls in enumerate(_CLASSES)}


class PictureChannel:
    """One end of the socket between a pool and a process. Every method raises `OSError`: `Disconnected` when the other
    end is closed, `TimeoutError` when the time of `start_clock` is over."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._deadline: float | None = None

    def start_clock(self, seconds: float | None) -> None:
        """All that is sent and received from now on must be done in this time; None: there is no hurry."""
        self._deadline = None if seconds is None else time.monotonic() + seconds

    def send(self, message: Message, following: str | bytes | memoryview = b"") -> None:
        """following: what comes after the message, of one byte an item; a text must be ASCII, and anything else in it
        becomes a question mark."""
        self._send(frame(_TAGS[type(message)] + wire.encode(message)))
        # Slices of a view are no copies.
        items = following if isinstance(following, str) else memoryview(following)
        for start in range(0, len(items), _PART_BYTES):
            part = items[start : start + _PART_BYTES]
            self._send(part.encode("ascii", "replace") if isinstance(part, str) else part)

    def receive(self) -> Message:
        """Raises `WireError` on anything but a message."""
        head = bytearray(_LENGTH.size)
        self.receive_into(memoryview(head))
        (length,) = _LENGTH.unpack(head)
        if length > MAX_MESSAGE_BYTES:
            raise wire.WireError(f"a message of {length} bytes")
        data = bytearray(length)
        self.receive_into(memoryview(data))
        if not data or data[0] >= len(_CLASSES):
            raise wire.WireError(f"a message of unknown class {data[:1].hex()!r}")
        return cast(Message, wire.decode(_CLASSES[data[0]], bytes(data[1:])))

    def receive_into(self, view: memoryview) -> None:
        """Fills a view of bytes with what follows a message."""
        got = 0
        while got < len(view):
            self._set_timeout()
            part = self._connection.recv_into(view[got:])
            if part == 0:
                raise Disconnected("the other end closed the connection")
            got += part

    def _send(self, data: bytes | memoryview) -> None:
        self._set_timeout()
        self._connection.sendall(data)

    def _set_timeout(self) -> None:
        left = None if self._deadline is None else self._deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError("the time is over")
        self._connection.settimeout(left)
