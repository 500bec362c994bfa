"""Several sources as one: nothing is lost or reordered, and none outlives the merge."""

from __future__ import annotations

import asyncio
import random
import warnings
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from dist_vlm.server.merging import merged


def run(work: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(5):
            await work

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of coroutines that nobody awaited
        asyncio.run(limited())


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Source:
    """Gives what is put into it; an exception it raises, and None is its end."""

    def __init__(self, *items: Any) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        for item in items:
            self.queue.put_nowait(item)
        self.num_given = 0
        self.num_closed = 0
        self.generator = self._items()

    async def _items(self) -> AsyncGenerator[Any, None]:
        try:
            while True:
                item = await self.queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    return
                self.num_given += 1
                yield item
        finally:
            await asyncio.sleep(0)
            self.num_closed += 1


def merge(sources: Sequence[Source]) -> AsyncGenerator[tuple[int, Any], None]:
    return merged([source.generator for source in sources])


def assert_closed(sources: Sequence[Source]) -> None:
    assert [source.num_closed for source in sources] == [1] * len(sources)
    assert asyncio.all_tasks() == {asyncio.current_task()}, "nobody asks a source any more"


def test_nothing_is_merged_of_no_sources() -> None:
    async def main() -> None:
        assert [item async for item in merge([])] == []

    run(main())


def test_one_source_goes_through_with_its_number() -> None:
    async def main() -> None:
        sources = [Source("a", "b", None)]
        assert [item async for item in merge(sources)] == [(0, "a"), (0, "b")]
        assert_closed(sources)

    run(main())


def test_items_come_as_they_are_made_whichever_source_makes_them() -> None:
    async def main() -> None:
        sources = [Source() for _ in range(3)]
        async with aclosing(merge(sources)) as news:
            for index, item in [(2, "a"), (0, "b"), (0, "c"), (1, "d"), (2, "e")]:
                sources[index].queue.put_nowait(item)
                assert await anext(news) == (index, item)
            for index in (1, 2, 0):
                sources[index].queue.put_nowait(None)
            with pytest.raises(StopAsyncIteration):
                await anext(news)
        assert_closed(sources)

    run(main())


@pytest.mark.parametrize("seed", range(5))
def test_every_item_comes_once_and_in_its_sources_order(seed: int) -> None:
    chance = random.Random(seed)
    lengths = [chance.randint(0, 12) for _ in range(6)]

    async def items(length: int) -> AsyncGenerator[int, None]:
        for number in range(length):
            for _ in range(chance.randint(0, 3)):
                await asyncio.sleep(0)
            yield number

    async def main() -> None:
        came: list[list[int]] = [[] for _ in lengths]
        async for index, item in merged([items(length) for length in lengths]):
            came[index].append(item)
            for _ in range(chance.randint(0, 2)):
                await asyncio.sleep(0)
        assert came == [list(range(length)) for length in lengths]

    run(main())


def test_what_is_there_at_once_comes_in_the_order_of_the_sources() -> None:
    async def main() -> None:
        sources = [Source("a", None) for _ in range(20)]
        assert [index async for index, _ in merge(sources)] == list(range(20))

    run(main())


def test_a_source_that_has_much_to_say_does_not_keep_the_others_from_it() -> None:
    async def main() -> None:
        sources = [Source(*range(1, 100), None), Source("a", "b", None)]
        came = [index async for index, _ in merge(sources)]
        assert came[:4].count(1) == 2

    run(main())


def test_a_source_is_not_asked_ahead_of_what_is_taken() -> None:
    """One item each is made at most, beside those that were taken."""

    async def main() -> None:
        for count in (1, 3):
            sources = [Source(*range(1, 50)) for _ in range(count)]
            news = merge(sources)
            for _ in range(5):
                await anext(news)
            await settle()
            assert sum(source.num_given for source in sources) <= 5 + count
            await news.aclose()
            assert_closed(sources)

    run(main())


@pytest.mark.parametrize("count", [1, 2, 4])
def test_an_error_of_one_is_raised_and_ends_all(count: int) -> None:
    async def main() -> None:
        sources = [Source("a") for _ in range(count)]
        news = merge(sources)
        for _ in range(count):
            await anext(news)
        sources[-1].queue.put_nowait(KeyError("x"))
        with pytest.raises(KeyError):
            await anext(news)
        assert_closed(sources)
        with pytest.raises(StopAsyncIteration):
            await anext(news)

    run(main())


def test_an_error_at_the_first_asking_ends_all() -> None:
    async def main() -> None:
        sources = [Source(), Source(KeyError("x")), Source("a")]
        with pytest.raises(KeyError):
            async for _ in merge(sources):
                pass
        assert_closed(sources)

    run(main())


def test_of_two_errors_one_is_raised_and_the_other_is_not_reported_as_lost() -> None:
    async def main() -> None:
        lost: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: lost.append(context))
        sources = [Source(KeyError("x")), Source(KeyError("y")), Source()]
        with pytest.raises(KeyError):
            await anext(merge(sources))
        assert_closed(sources)
        assert not lost

    run(main())


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("num_taken", [1, 2, 3])
def test_closing_closes_all(count: int, num_taken: int) -> None:
    """Those that wait, those that have made an item that nobody took, and those that have ended."""

    async def main() -> None:
        sources = [Source("a", "b", "c"), Source(), Source("a"), Source(None)][:count]
        news = merge(sources)
        for _ in range(num_taken):
            await anext(news)
        await news.aclose()
        assert_closed(sources)

    run(main())


@pytest.mark.parametrize("count", [1, 3])
def test_whoever_waits_for_an_item_may_be_cancelled(count: int) -> None:
    async def main() -> None:
        sources = [Source("a") for _ in range(count)]
        news = merge(sources)
        for _ in range(count):
            await anext(news)
        waiting = asyncio.ensure_future(anext(news))
        await settle()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert_closed(sources)

    run(main())


def test_a_source_that_fails_to_close_does_not_keep_the_others_open() -> None:
    class Stubborn(Source):
        async def _items(self) -> AsyncGenerator[Any, None]:
            try:
                async for item in super()._items():
                    yield item
            finally:
                raise OSError("cannot be closed")

    async def main() -> None:
        sources = [Source("a"), Stubborn("a"), Source("a")]
        news = merge(sources)
        for _ in sources:
            await anext(news)
        for source in sources:  # so that none is waiting when it is closed
            source.queue.put_nowait("b")
        await settle()
        with pytest.raises(OSError, match="cannot be closed"):
            await news.aclose()
        assert (sources[0].num_closed, sources[2].num_closed) == (1, 1)

    run(main())
