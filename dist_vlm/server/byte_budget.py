"""Memory that several requests share, handed out in the order of asking."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dist_vlm.server.errors import ApiError


class Share:
    """What a request holds of a budget."""

    def __init__(self, budget: ByteBudget, num_bytes: int) -> None:
        self._budget = budget
        self.num_bytes = num_bytes

    def shrink(self, num_bytes: int) -> None:
        """Gives back all but this much; more than there is changes nothing."""
        freed = self.num_bytes - num_bytes
        if freed > 0:
            self.num_bytes = num_bytes
            self._budget.give_back(freed)


class ByteBudget:
    """Used in the event loop alone. Who holds a share of a budget must not ask the same budget for more: so there is
    always one who can go on.

    name: what messages call it. capacity: bytes. timeout_s: how long a request waits for its share.
    """

    def __init__(self, name: str, capacity: int, *, timeout_s: float) -> None:
        self.name, self.capacity = name, capacity
        self._timeout_s = timeout_s
        self.num_held = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def share(self, num_bytes: int) -> AsyncIterator[Share]:
        """Waits for the bytes and holds them. Raises a 413 for more than there are, a 429 after too long a wait."""
        if num_bytes > self.capacity:
            text = f"the request needs {num_bytes} bytes for its {self.name}; all requests share {self.capacity}"
            raise ApiError(413, text, code="too_large")
        await self._take(num_bytes)
        share = Share(self, num_bytes)
        try:
            yield share
        finally:
            share.shrink(0)

    def give_back(self, num_bytes: int) -> None:
        self.num_held -= num_bytes
        self._serve()

    async def _take(self, num_bytes: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((num_bytes, turn))
        self._serve()
        try:
            async with asyncio.timeout(self._timeout_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.give_back(num_bytes)  # it came together with the end of the wait
            else:
                turn.cancel()
                self._serve()
            if isinstance(error, TimeoutError):
                text = f"no memory for {self.name} came free in {self._timeout_s:g} s: try again later"
                raise ApiError(429, text, code="out_of_memory", retry_after_s=5) from None
            raise

    def _serve(self) -> None:
        """Gives shares to those at the head of the queue, as far as the bytes go."""
        while self._waiting:
            num_bytes, turn = self._waiting[0]
            if turn.done():  # it gave up
                self._waiting.popleft()
                continue
            if self.num_held + num_bytes > self.capacity:
                return
            self._waiting.popleft()
            self.num_held += num_bytes
            turn.set_result(None)
