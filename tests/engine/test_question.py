"""Many askers, one question at a time: each gets an answer asked for after it came, or the error of the end."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from queue import SimpleQueue

import pytest

from dist_vlm.engine.question import Question


class Asked:
    """A question whose sendings are counted and answered by the test."""

    def __init__(self) -> None:
        self.num_sent = 0
        self.question: Question[int] = Question(self.send)

    def send(self) -> None:
        self.num_sent += 1


def test_an_answer_is_for_those_who_had_come_when_it_was_asked_for() -> None:
    asked = Asked()
    first, second, third = (asked.question.ask() for _ in range(3))
    assert asked.num_sent == 1
    asked.question.answer(5)
    assert first.result(0) == 5
    assert not second.done()
    assert asked.num_sent == 2, "it is asked again for those who came later"
    asked.question.answer(6)
    assert (second.result(0), third.result(0)) == (6, 6)
    assert asked.num_sent == 2, "nobody waits"
    fourth = asked.question.ask()
    asked.question.answer(7)
    assert (fourth.result(0), asked.num_sent) == (7, 3)


def test_those_who_gave_up_leave_nothing_and_spoil_nothing() -> None:
    asked = Asked()
    for _ in range(1000):
        asked.question.ask().cancel()
    assert asked.num_sent == 1, "a core that stands still is left with one question"
    assert len(asked.question._waiting) + len(asked.question._asked) <= 2
    late = asked.question.ask()
    asked.question.answer(1)
    assert not late.done(), "that answer was asked for before"
    asked.question.answer(2)
    assert late.result(0) == 2
    given_up = asked.question.ask()
    lonely = asked.question.ask()
    given_up.cancel()
    lonely.cancel()
    asked.question.answer(3)
    assert asked.num_sent == 3, "nobody waits any more"


def test_the_end_reaches_those_who_wait_and_those_who_come_later() -> None:
    asked = Asked()
    first, given_up, second = (asked.question.ask() for _ in range(3))
    given_up.cancel()
    asked.question.end(RuntimeError("gone"))
    asked.question.end(RuntimeError("gone twice"))
    for reply in (first, second, asked.question.ask()):
        with pytest.raises(RuntimeError, match="^gone$"):
            reply.result(0)
    asked.question.answer(4)
    assert asked.num_sent == 1


def test_no_answer_is_older_than_its_question() -> None:
    """The answer is how often it was asked for, taken while others ask."""
    num_sent, outbox = 0, SimpleQueue[int | None]()

    def send() -> None:
        nonlocal num_sent
        num_sent += 1  # sent once at a time
        outbox.put(num_sent)

    question: Question[int] = Question(send)

    def serve() -> None:
        while (number := outbox.get()) is not None:
            question.answer(number)

    def ask() -> None:
        for _ in range(300):
            before = num_sent
            reply: Future[int] = question.ask()
            if reply.result(10) <= before:
                stale.append(before)

    stale: list[int] = []
    server = threading.Thread(target=serve)
    askers = [threading.Thread(target=ask) for _ in range(4)]
    for thread in (server, *askers):
        thread.start()
    for thread in askers:
        thread.join()
    outbox.put(None)
    server.join()
    assert not stale
    assert num_sent <= 4 * 300
