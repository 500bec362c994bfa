"""How many requests are in the server at once: those beyond are told to come back."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dist_vlm.server.errors import ApiError

_LONGEST_WAIT_S = 60
# Weight of the newest request in the mean duration.
_NEWEST = 0.1


class Seat:
    """A request's place in the server, which counts for as many as it asks answers."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.size = 0

    def grow(self, size: int) -> None:
        """Makes the seat as large as the request turned out to be. Raises a 429 if there is no room for it, a 400 if
        there never is."""
        self._admission.take(self, size)


class Admission:
    """Bounds the answers in work and in the queue. Used in the event loop alone.

    max_seats: answers at once, those being prepared included. num_running: about how many of them run at once.
    """

    def __init__(self, *, max_seats: int, num_running: int) -> None:
        self.max_seats = max_seats
        self._num_running = num_running
        self._mean_s = 1.0
        self.num_taken = 0
        self.is_draining = False
        self._emptied = asyncio.Event()
        self._emptied.set()

    async def drain(self) -> None:
        """Lets nobody in from here on, and waits for those inside to leave."""
        self.is_draining = True
        await self._emptied.wait()

    @contextmanager
    def enter(self) -> Iterator[Seat]:
        """A seat for one answer until the end of the request. Raises a 503 while draining, a 429 if all are taken."""
        if self.is_draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after_s=1)
        seat = Seat(self)
        self.take(seat, 1)
        began = time.monotonic()
        try:
            yield seat
        finally:
            self.num_taken -= seat.size
            if not self.num_taken:
                self._emptied.set()
            self._mean_s += _NEWEST * (time.monotonic() - began - self._mean_s)

    def take(self, seat: Seat, size: int) -> None:
        if size > self.max_seats:
            text = f"the request asks for {size} answers; at most {self.max_seats} are served at once"
            raise ApiError(400, text, param="n", code="too_many_answers")
        if self.num_taken + size - seat.size > self.max_seats:
            text = f"{self.num_taken} answers are in work or waiting, of at most {self.max_seats}: try again later"
            raise ApiError(429, text, code="queue_full", retry_after_s=self._wait_s())
        self.num_taken += size - seat.size
        seat.size = size
        self._emptied.clear()

    def _wait_s(self) -> int:
        """About when some will have ended."""
        turns = self.num_taken / max(1, self._num_running)
        return min(_LONGEST_WAIT_S, max(1, math.ceil(self._mean_s * turns / 2)))
