import socket
import threading

import pytest

from dist_vlm.workers.frames import Disconnected, receive_frame, send_frame


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
