"""The channel between a pool and its processes: nothing is lost, nothing is believed, and nothing takes for ever."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator

import msgpack
import pytest

from dist_vlm.engine import picture_messages as messages
from dist_vlm.engine.picture_messages import PictureChannel
from dist_vlm.workers.frames import Disconnected
from dist_vlm.workers.wire import WireError


@pytest.fixture
def pair() -> Iterator[tuple[PictureChannel, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield PictureChannel(ours), theirs


@pytest.mark.parametrize(
    "message",
    [
        messages.Configure('{"model": "x"}', 1 << 40, 7),
        messages.Decode("messages[0].content[1]", True, 5),
        messages.Ready(),
        messages.Broken("no file"),
        messages.Prepared("ab" * 16, "pixel_values", (1, 3, 56, 56), 0.25, 0.5, 80, 60),
        messages.Refused("image 0: not a picture"),
    ],
)
def test_every_message_crosses(message: messages.Message, pair: tuple[PictureChannel, socket.socket]) -> None:
    channel, theirs = pair
    channel.send(message)
    assert PictureChannel(theirs).receive() == message


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_000_000])
def test_what_follows_a_message_crosses_whole(size: int, pair: tuple[PictureChannel, socket.socket]) -> None:
    channel, theirs = pair
    text = "".join(chr(33 + i % 90) for i in range(997)) * (size // 997 + 1)
    for following in (text[:size], text[:size].encode(), memoryview(text[:size].encode())):
        sender = threading.Thread(target=channel.send, args=(messages.Decode("it", True, size), following))
        sender.start()
        receiver = PictureChannel(theirs)
        message = receiver.receive()
        assert isinstance(message, messages.Decode)
        data = bytearray(message.size)
        receiver.receive_into(memoryview(data))
        sender.join()
        assert bytes(data) == text[:size].encode()


def test_a_text_that_is_not_ascii_keeps_its_length(pair: tuple[PictureChannel, socket.socket]) -> None:
    channel, theirs = pair
    channel.send(messages.Ready(), "aé€\ud800z")
    receiver, data = PictureChannel(theirs), bytearray(5)
    receiver.receive()
    receiver.receive_into(memoryview(data))
    assert data == b"a???z"


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xff",
        b"\x02",  # no fields
        b"\x02" + msgpack.packb([1]),
        b"\x05" + msgpack.packb([b"bytes"]),
        b"\x04" + msgpack.packb(["k", [1, "3"], 0.1, 0.1, 8, 8]),
        b"\x05not msgpack",
    ],
)
def test_what_is_no_message_is_an_error(frame: bytes, pair: tuple[PictureChannel, socket.socket]) -> None:
    channel, theirs = pair
    theirs.sendall(struct.pack(">I", len(frame)) + frame)
    with pytest.raises(WireError):
        channel.receive()


def test_no_memory_is_taken_for_a_message_that_claims_gigabytes(pair: tuple[PictureChannel, socket.socket]) -> None:
    channel, theirs = pair
    theirs.sendall(struct.pack(">I", 0xFFFFFFFF))
    with pytest.raises(WireError, match="a message of 4294967295 bytes"):
        channel.receive()


def test_an_end_that_dribbles_does_not_win_time(pair: tuple[PictureChannel, socket.socket]) -> None:
    channel, theirs = pair
    stop = threading.Event()

    def dribble() -> None:
        while not stop.wait(0.02):
            theirs.sendall(b"\0")

    thread = threading.Thread(target=dribble)
    thread.start()
    try:
        channel.start_clock(0.2)
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            channel.receive_into(memoryview(bytearray(1000)))
        assert 0.15 < time.monotonic() - began < 5
    finally:
        stop.set()
        thread.join()


def test_an_end_that_does_not_read_does_not_hold_up_the_sender(pair: tuple[PictureChannel, socket.socket]) -> None:
    channel, _ = pair
    channel.start_clock(0.1)
    with pytest.raises(TimeoutError):
        channel.send(messages.Ready(), bytes(50 << 20))


def test_a_closed_end_is_told(pair: tuple[PictureChannel, socket.socket]) -> None:
    channel, theirs = pair
    theirs.sendall(struct.pack(">I", 100) + b"\x02")
    theirs.close()
    with pytest.raises(Disconnected):
        channel.receive()
