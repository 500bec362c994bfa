"""One question put to the engine core again and again, by many at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Question(Generic[T]):
    """Asks once at a time: an answer is for those who had come when it was asked for, and the later ones get the next.

    So an answer is never older than the call that gets it, and a core that stands still is left with one question,
    however many have given up waiting. Safe for use from several threads.

    send: puts the question; `answer` is called some time later, not by it.
    """

    def __init__(self, send: Callable[[], None]) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._is_asked = False
        self._asked: list[Future[T]] = []
        self._waiting: list[Future[T]] = []
        self._end: Exception | None = None

    def ask(self) -> Future[T]:
        """The next answer, or the error that `end` gives. A caller that no longer wants it may cancel it."""
        reply: Future[T] = Future()
        with self._lock:
            end = self._end
            if end is None:
                self._waiting.append(reply)
            must_send = self._next_turn()
        if end is not None:
            reply.set_exception(end)
        if must_send:
            self._send()
        return reply

    def answer(self, value: T) -> None:
        """What the core says to the question sent last."""
        with self._lock:
            asked, self._asked, self._is_asked = self._asked, [], False
            must_send = self._next_turn()
        for reply in asked:
            if reply.set_running_or_notify_cancel():
                reply.set_result(value)
        if must_send:
            self._send()

    def end(self, error: Exception) -> None:
        """No answer will come: to all who wait, and to those still to come, this error. The first call counts."""
        with self._lock:
            if self._end is not None:
                return
            self._end = error
            unanswered = self._asked + self._waiting
            self._asked, self._waiting = [], []
        for reply in unanswered:
            if reply.set_running_or_notify_cancel():
                reply.set_exception(error)

    def _next_turn(self) -> bool:
        """Whether the question must be sent now, for those who wait. The lock is held."""
        self._waiting = [one for one in self._waiting if not one.cancelled()]
        if self._is_asked or not self._waiting:
            return False
        self._asked, self._waiting, self._is_asked = self._waiting, [], True
        return True
