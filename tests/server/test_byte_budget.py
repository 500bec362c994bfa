"""Memory in the order of asking: nothing is lost, whoever gives up or is cancelled, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest

from dist_vlm.server.byte_budget import ByteBudget
from dist_vlm.server.errors import ApiError


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Holder:
    """Asks for a share in a task, and keeps it until it is told to let go."""

    def __init__(self, budget: ByteBudget, num_bytes: int, order: list[int] | None = None) -> None:
        self.num_bytes = num_bytes
        self.has_it = False
        self._budget = budget
        self._order = order
        self._release = asyncio.Event()
        self.task = asyncio.create_task(self._hold())

    async def _hold(self) -> None:
        async with self._budget.share(self.num_bytes):
            self.has_it = True
            if self._order is not None:
                self._order.append(self.num_bytes)
            await self._release.wait()
        self.has_it = False

    async def let_go(self) -> None:
        self._release.set()
        await self.task


def test_a_share_is_held_and_given_back() -> None:
    async def main() -> None:
        budget = ByteBudget("files", 100, timeout_s=1)
        async with budget.share(60) as share:
            assert (budget.num_held, share.num_bytes) == (60, 60)
            async with budget.share(40):
                assert budget.num_held == 100
            assert budget.num_held == 60
        assert budget.num_held == 0
        async with budget.share(0):
            assert budget.num_held == 0

    run(main())


def test_more_than_there_is_in_all_is_a_413_at_once() -> None:
    async def main() -> None:
        budget = ByteBudget("files", 100, timeout_s=1)
        async with budget.share(100):
            with pytest.raises(ApiError) as caught:
                await budget.share(101).__aenter__()
        assert (caught.value.status, caught.value.code) == (413, "too_large")
        assert "101 bytes for its files" in caught.value.message
        assert budget.num_held == 0

    run(main())


def test_shares_come_in_the_order_of_asking() -> None:
    """A small one does not overtake a large one, which would then never come."""

    async def main() -> None:
        budget, order = ByteBudget("files", 100, timeout_s=5), list[int]()
        first = Holder(budget, 90, order)
        await settle()
        waiting = [Holder(budget, size, order) for size in (50, 5, 40, 10, 60)]
        await settle()
        assert order == [90]
        await first.let_go()
        await settle()
        assert order == [90, 50, 5, 40]
        assert budget.num_held == 95
        await waiting[1].let_go()
        await settle()
        assert order[4:] == [10]
        for holder in waiting:
            await holder.let_go()
        assert order[5:] == [60]
        assert budget.num_held == 0

    run(main())


def test_a_share_that_shrinks_lets_the_next_one_in() -> None:
    async def main() -> None:
        budget = ByteBudget("files", 100, timeout_s=5)
        async with budget.share(80) as share:
            next_one = Holder(budget, 70)
            await settle()
            share.shrink(31)
            await settle()
            assert not next_one.has_it
            share.shrink(30)
            await settle()
            assert next_one.has_it
            assert budget.num_held == 100
            share.shrink(50)
            assert (share.num_bytes, budget.num_held) == (30, 100), "it does not grow again"
            await next_one.let_go()
        assert budget.num_held == 0
        share.shrink(0)
        assert budget.num_held == 0, "it is given back once"

    run(main())


def test_a_wait_that_is_too_long_is_a_429_and_leaves_nothing() -> None:
    async def main() -> None:
        budget = ByteBudget("files", 100, timeout_s=0.03)
        async with budget.share(60):
            with pytest.raises(ApiError) as caught:
                await budget.share(50).__aenter__()
            assert (caught.value.status, caught.value.code) == (429, "out_of_memory")
            assert "files" in caught.value.message
            assert "Retry-After" in caught.value.headers
            assert budget.num_held == 60
            async with budget.share(40):
                assert budget.num_held == 100, "who gave up stands in nobody's way"
        assert budget.num_held == 0

    run(main())


def test_those_behind_one_that_gives_up_go_on() -> None:
    async def main() -> None:
        budget = ByteBudget("files", 100, timeout_s=5)
        async with budget.share(60):
            large, small = Holder(budget, 90), Holder(budget, 40)
            await settle()
            assert not small.has_it
            large.task.cancel()
            await settle()
            assert small.has_it
            await small.let_go()
        assert budget.num_held == 0

    run(main())


def test_a_request_that_is_cancelled_behind_others_is_passed_over() -> None:
    async def main() -> None:
        budget, order = ByteBudget("files", 100, timeout_s=5), list[int]()
        async with budget.share(100):
            holders = [Holder(budget, size, order) for size in (70, 30, 25)]
            await settle()
            holders[1].task.cancel()
            await settle()
        await settle()
        assert order == [70, 25]
        assert budget.num_held == 95
        for holder in (holders[0], holders[2]):
            await holder.let_go()
        assert budget.num_held == 0

    run(main())


def test_a_request_cancelled_in_the_moment_its_share_comes_gives_it_on() -> None:
    async def main() -> None:
        budget = ByteBudget("files", 100, timeout_s=5)
        first = budget.share(100)
        await first.__aenter__()
        second, third = Holder(budget, 80), Holder(budget, 90)
        await settle()
        await first.__aexit__(None, None, None)
        assert budget.num_held == 80, "it is the second's, which does not know yet"
        second.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second.task
        await settle()
        assert not second.has_it
        assert third.has_it
        assert budget.num_held == 90
        await third.let_go()
        assert budget.num_held == 0

    run(main())


def test_a_request_whose_wait_ends_in_the_moment_its_share_comes_gives_it_on() -> None:
    async def main() -> None:
        budget = ByteBudget("files", 100, timeout_s=0.02)
        loop = asyncio.get_running_loop()
        async with budget.share(100) as share:
            second = Holder(budget, 80)
            await settle()
            # In one round of the loop its share comes, and then its time has run out.
            loop.call_soon(share.shrink, 0)
            deadline = loop.time() + 0.03
            while loop.time() < deadline:
                pass
            with pytest.raises(ApiError) as caught:
                await second.task
        assert caught.value.status == 429
        assert budget.num_held == 0

    run(main())


def test_a_request_cancelled_before_it_asked_takes_nothing() -> None:
    async def main() -> None:
        budget = ByteBudget("files", 100, timeout_s=5)
        holder = Holder(budget, 80)
        holder.task.cancel()
        await settle()
        assert budget.num_held == 0

    run(main())


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError])
def test_a_share_is_given_back_whatever_happens_in_it(error: type[BaseException]) -> None:
    async def main() -> None:
        budget = ByteBudget("files", 100, timeout_s=5)
        with pytest.raises(error):
            async with budget.share(50):
                raise error
        assert budget.num_held == 0

    run(main())


@pytest.mark.parametrize("seed", range(12))
def test_in_any_order_of_asking_shrinking_leaving_and_giving_up_all_is_given_back(seed: int) -> None:
    """Whoever does not give up gets a share in the end, and together they never hold more than there is."""
    chance = random.Random(seed)
    served: set[int] = set()

    async def one(budget: ByteBudget, number: int) -> None:
        async with budget.share(chance.randint(0, 100)) as share:
            served.add(number)
            assert budget.num_held <= 100
            for _ in range(chance.randint(0, 4)):
                await asyncio.sleep(0)
                share.shrink(chance.randint(0, 100))
            if chance.random() < 0.1:
                raise ValueError

    async def main() -> None:
        budget = ByteBudget("files", 100, timeout_s=5)
        tasks: list[asyncio.Task[None]] = []
        cancelled: set[int] = set()
        for number in range(150):
            tasks.append(asyncio.create_task(one(budget, number)))
            for _ in range(chance.randint(0, 3)):
                if chance.random() < 0.3:
                    victim = chance.randrange(len(tasks))
                    if tasks[victim].cancel():
                        cancelled.add(victim)
                await asyncio.sleep(0)
            assert 0 <= budget.num_held <= 100
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert budget.num_held == 0
        assert set(range(150)) - cancelled <= served
        assert all(result is None or isinstance(result, (ValueError, asyncio.CancelledError)) for result in results)
        async with asyncio.timeout(1), budget.share(100):
            assert budget.num_held == 100

    run(main())


@pytest.mark.parametrize("seed", range(4))
def test_waits_that_end_beside_shares_that_come_lose_nothing(seed: int) -> None:
    chance = random.Random(seed)

    async def one(budget: ByteBudget) -> str:
        await asyncio.sleep(chance.random() * 0.05)
        try:
            async with budget.share(chance.randint(30, 100)):
                await asyncio.sleep(chance.random() * 0.004)
        except ApiError:
            return "late"
        return "served"

    async def main() -> None:
        budget = ByteBudget("files", 100, timeout_s=0.03)
        results = await asyncio.gather(*(one(budget) for _ in range(60)))
        assert set(results) == {"late", "served"}
        assert budget.num_held == 0
        async with budget.share(100):
            pass

    run(main())
