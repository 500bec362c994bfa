"""Many coroutines beside each other, so many at most; the first that fails ends all."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Self


class BoundedTasks:
    """Used as a context manager: leaving it waits for all, and raises the first error; leaving it with an error gives
    all up."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._under_way: set[asyncio.Task[None]] = set()

    async def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Waits until there is room. Raises the error of one that has failed, and then does not start."""
        try:
            self._drop_ended()
            while len(self._under_way) >= self._most:
                await self._wait()
        except BaseException:
            work.close()
            raise
        self._under_way.add(asyncio.create_task(work))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        try:
            while self._under_way and kind is None:
                await self._wait()
        finally:
            for task in self._under_way:
                task.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _wait(self) -> None:
        """Until some have ended."""
        await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
        self._drop_ended()

    def _drop_ended(self) -> None:
        """Raises the error of one that has failed; all are kept then, for the end to look at."""
        ended = {task for task in self._under_way if task.done()}
        for task in ended:
            task.result()
        self._under_way -= ended
