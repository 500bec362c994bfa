import socket
import threading

import pytest

from dist_vlm.workers.frames import Disconnected, FrameBuffer, frame, receive_frame, send_frame


@pytest.fixture
def pair():
    left, right = socket.socketpair()
    yield left, right
    left.close()
    right.close()


@pytest.mark.parametrize("size", [0, 1, 70_000, 5_000_000])
def test_a_message_of_any_size_arrives_whole(pair, size):
    left, right = pair
    message = bytes(i % 251 for i in range(size))
    sender = threading.Thread(target=lambda: (send_frame(left, message), send_frame(left, b"next")))
    sender.start()
    assert receive_frame(right) == message
    assert receive_frame(right) == b"next"
    sender.join()


def test_an_end_between_or_inside_messages_is_told(pair):
    left, right = pair
    left.sendall(b"\0\0\0\x09half")
    left.close()
    with pytest.raises(Disconnected):
        receive_frame(right)
    with pytest.raises(Disconnected):
        receive_frame(right)


def test_a_timeout_is_told(pair):
    _, right = pair
    right.settimeout(0.05)
    with pytest.raises(TimeoutError):
        receive_frame(right)


@pytest.mark.parametrize("part_bytes", [1, 3, 4, 5, 100_000])
def test_a_buffer_gives_the_messages_however_the_stream_was_cut(part_bytes):
    messages = [b"", b"a", bytes(range(256)) * 4, b"", b"end"]
    stream = b"".join(map(frame, messages))
    buffer, got, times = FrameBuffer(), [], []
    for start in range(0, len(stream), part_bytes):
        completed = buffer.feed(stream[start : start + part_bytes])
        got += completed
        times += [start + part_bytes] * len(completed)
    assert got == messages
    # Each comes with the part that ends it: the ends of the messages, rounded up to whole parts.
    ends = [sum(len(frame(message)) for message in messages[: count + 1]) for count in range(len(messages))]
    assert times == [-(-end // part_bytes) * part_bytes for end in ends]
    assert buffer.feed(frame(b"next")[:-1]) == []
    assert buffer.feed(b"t") == [b"next"]
