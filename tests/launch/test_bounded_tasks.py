from __future__ import annotations

import asyncio

import pytest

from dist_vlm.launch.bounded_tasks import BoundedTasks


class Work:
    def __init__(self) -> None:
        self.now = self.most = self.done = 0
        self.cancelled = 0

    async def one(self, rounds: int, error: Exception | None = None) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            for _ in range(rounds):
                await asyncio.sleep(0)
            if error is not None:
                raise error
            self.done += 1
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.now -= 1


def test_so_many_run_at_once_and_all_end_before_it_is_left() -> None:
    work = Work()

    async def run() -> None:
        async with BoundedTasks(3) as tasks:
            for index in range(10):
                await tasks.start(work.one(1 + index % 4))

    asyncio.run(run())
    assert (work.most, work.done, work.now) == (3, 10, 0)


@pytest.mark.parametrize("num_after", [0, 5])
def test_the_first_error_ends_the_others(num_after: int) -> None:
    work = Work()

    async def run() -> None:
        async with BoundedTasks(3) as tasks:
            await tasks.start(work.one(10**9))
            await tasks.start(work.one(1, RuntimeError("lost")))
            for _ in range(num_after):
                await tasks.start(work.one(10**9))

    with pytest.raises(RuntimeError, match="lost"):
        asyncio.run(asyncio.wait_for(run(), 10))
    assert work.now == work.done == 0
    assert work.cancelled == 1 + min(num_after, 1)


def test_a_failure_is_told_at_the_next_start_though_there_is_room() -> None:
    work = Work()

    async def run() -> None:
        async with BoundedTasks(100) as tasks:
            await tasks.start(work.one(10**9))
            await tasks.start(work.one(0, RuntimeError("lost")))
            await asyncio.sleep(0.01)
            with pytest.raises(RuntimeError, match="lost"):
                await tasks.start(work.one(10**9))
            assert work.now == 1
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        asyncio.run(asyncio.wait_for(run(), 10))
    assert (work.cancelled, work.now) == (1, 0)


def test_an_error_of_the_caller_ends_all() -> None:
    work = Work()

    async def run() -> None:
        async with BoundedTasks(3) as tasks:
            await tasks.start(work.one(10**9))
            await asyncio.sleep(0)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        asyncio.run(asyncio.wait_for(run(), 10))
    assert (work.cancelled, work.now) == (1, 0)
