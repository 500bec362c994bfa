"""Several asynchronous sources as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Generic, TypeVar

Item = TypeVar("Item")


async def merged(sources: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[tuple[int, Item], None]:
    """Yields what each source does, with its number, as it comes. What one raises is raised; all are closed then, and
    when this is closed. A source is asked for its next item once the one before was taken."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for item in only:
                yield 0, item
        return
    merge = _Merge(sources)
    try:
        async for pair in merge.items():
            yield pair
    finally:
        await merge.close()


class _Merge(Generic[Item]):
    def __init__(self, sources: Sequence[AsyncGenerator[Item, None]]) -> None:
        self._sources = sources
        self._asked = {self._ask(index): index for index in range(len(sources))}

    def _ask(self, index: int) -> asyncio.Future[Item]:
        return asyncio.ensure_future(anext(self._sources[index]))

    async def items(self) -> AsyncGenerator[tuple[int, Item], None]:
        while self._asked:
            done, _ = await asyncio.wait(self._asked, return_when=asyncio.FIRST_COMPLETED)
            for future in sorted(done, key=self._asked.__getitem__):
                index = self._asked.pop(future)
                try:
                    item = future.result()
                except StopAsyncIteration:
                    continue
                yield index, item
                self._asked[self._ask(index)] = index

    async def close(self) -> None:
        """All of them, whatever closing one raises."""
        async with AsyncExitStack() as closing:
            for source in self._sources:
                closing.push_async_callback(source.aclose)
            for future in self._asked:
                future.cancel()
            await asyncio.gather(*self._asked, return_exceptions=True)
