import socket
import threading

import pytest

from dist_vlm.workers import wire
from dist_vlm.workers.failure import RankError
from dist_vlm.workers.frames import receive_frame, send_frame
from dist_vlm.workers.serve import Answer, Hello, serve


@pytest.fixture
def served(tmp_path):
    """The driver's end of a rank that upper-cases plans and fails on b'bad'."""

    def step(plan):
        if plan == b"bad":
            raise RankError(3, "step", "ValueError: no")
        return plan.upper()

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "s"))
    listener.listen(1)
    arguments = {"rank": 3, "path": str(tmp_path / "s"), "token": "t"}
    thread = threading.Thread(target=serve, args=(step,), kwargs=arguments)
    thread.start()
    connection, _ = listener.accept()
    yield connection
    connection.close()
    listener.close()
    thread.join(5)
    assert not thread.is_alive(), "it returns when the driver closes"


def test_a_rank_says_who_it_is_then_answers_in_order(served):
    assert wire.decode(Hello, receive_frame(served)) == Hello(3, "t")
    for plan in (b"a", b"bad", b"c"):
        send_frame(served, plan)
    answers = [wire.decode(Answer, receive_frame(served)) for _ in range(3)]
    assert answers == [Answer(b"A"), Answer(b"", "step", "ValueError: no"), Answer(b"C")]
