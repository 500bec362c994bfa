"""Whole messages over a stream socket: a length of four bytes, big-endian, then the message."""

from __future__ import annotations

import socket
import struct

_LENGTH = struct.Struct(">I")


class Disconnected(ConnectionError):  # noqa: N818 - what happened, not what went wrong
    """The other end closed the connection, between messages or inside one."""


def frame(message: bytes) -> bytes:
    """The message as it crosses a stream."""
    return _LENGTH.pack(len(message)) + message


def send_frame(connection: socket.socket, message: bytes) -> None:
    """Raises `OSError`, a `TimeoutError` among them where the socket has a timeout."""
    connection.sendall(frame(message))


def receive_frame(connection: socket.socket) -> bytes:
    """Blocks, or as long as the socket's timeout, for each part of a message. Raises `Disconnected`, `OSError`."""
    (length,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size))
    return bytes(_receive_exactly(connection, length))


class FrameBuffer:
    """Puts messages together from parts of a stream, for a reader that must not block inside a message."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, part: bytes) -> list[bytes]:
        """The messages that `part` completes, in order."""
        self._data += part
        messages = []
        while len(self._data) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._data)[0]
            if len(self._data) < end:
                break
            messages.append(bytes(self._data[_LENGTH.size : end]))
            del self._data[:end]
        return messages


def _receive_exactly(connection: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view, got = memoryview(data), 0
    while got < count:
        part = connection.recv_into(view[got:])
        if part == 0:
            raise Disconnected("the other end closed the connection")
        got += part
    return data
