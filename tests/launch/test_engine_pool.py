"""The pool over replicas that are lost when they are told to be."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

import pytest

from dist_vlm.executor.base import ExecutorError, StartError
from dist_vlm.launch import engine_pool
from dist_vlm.launch.engine_pool import MAX_LOST, MAX_STARTS, MAX_TRIES, EnginePool, LinesGivenUp, ReplicaLost


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_pool, "PAUSE_S", 0.001)


class Farm:
    """Makes replicas; one that is given "poison" is lost with all it has, and so is one after `lives` answers.

    refuses: places where none starts. fails: number of a start, from 1 -> what it raises.
    """

    def __init__(
        self,
        lives: int = 10**9,
        refuses: frozenset[int] = frozenset(),
        fails: Mapping[int, Exception] | None = None,
    ) -> None:
        self.made: list[OneReplica] = []
        self.lives, self.refuses = lives, refuses
        self.fails = fails or {}
        self.num_starts = 0

    async def start(self, number: int) -> OneReplica:
        self.num_starts += 1
        error = self.fails.get(self.num_starts)
        await asyncio.sleep(0.001)
        if error is not None:
            raise error
        if number in self.refuses:
            raise StartError("replica", "no memory")
        self.made.append(OneReplica(self, number))
        return self.made[-1]


class OneReplica:
    def __init__(self, farm: Farm, number: int) -> None:
        self.farm, self.number = farm, number
        self.lost, self.ended = asyncio.Event(), False
        self.lives = farm.lives
        self.now = self.most = self.num_asked = 0

    async def ask(self, lines: Any) -> Any:
        self.now += 1
        self.num_asked += 1
        self.most = max(self.most, self.now)
        try:
            if lines == "poison":
                self.lost.set()
            await asyncio.sleep(0.002)
            if self.lost.is_set() or self.lives == 0:
                self.lost.set()
                raise ReplicaLost(f"rank 0 of {self.number} died")
            self.lives -= 1
            return f"answer to {lines}"
        finally:
            self.now -= 1

    async def end(self) -> None:
        self.ended = True


def run(farm: Farm, lines: list[str], *, size: int = 2, most: int = 4) -> list[Any]:
    async def work() -> list[Any]:
        async with EnginePool(farm.start, size=size, most=most) as pool:
            return await asyncio.gather(*map(pool.ask, lines), return_exceptions=True)

    return asyncio.run(limited(work()))


async def limited(work: Coroutine[Any, Any, Any]) -> Any:
    return await asyncio.wait_for(work, 20)


def test_lines_are_spread_within_the_bound_and_the_replicas_end() -> None:
    farm, lines = Farm(), [str(number) for number in range(40)]
    assert run(farm, lines) == [f"answer to {line}" for line in lines]
    assert [replica.most for replica in farm.made] == [4, 4]
    assert all(15 <= replica.num_asked <= 25 for replica in farm.made)
    assert all(replica.ended for replica in farm.made)


def test_lines_of_a_lost_replica_are_answered_by_others() -> None:
    farm, lines = Farm(lives=11), [str(number) for number in range(60)]
    assert run(farm, lines) == [f"answer to {line}" for line in lines]
    assert len(farm.made) >= 6
    assert all(replica.ended for replica in farm.made)
    assert {replica.number for replica in farm.made} == {0, 1}


def test_a_line_that_ends_every_engine_is_given_up_and_takes_no_other_with_it() -> None:
    farm, lines = Farm(), [*map(str, range(20)), "poison", *map(str, range(20, 60))]
    answers = run(farm, lines)
    given_up = answers.pop(lines.index("poison"))
    lines.remove("poison")
    assert isinstance(given_up, LinesGivenUp)
    assert str(given_up).startswith(f"{MAX_TRIES} engines ended while they had this line, the last one: rank 0 of")
    assert answers == [f"answer to {line}" for line in lines]
    assert len(farm.made) <= 2 + MAX_TRIES


def test_engines_that_end_again_and_again_end_the_run() -> None:
    farm = Farm(lives=0)
    answers = run(farm, [str(number) for number in range(100)])
    broken = [answer for answer in answers if isinstance(answer, ExecutorError)]
    assert broken
    assert f"{MAX_LOST} engines ended one after the other" in str(broken[0])
    assert not [answer for answer in answers if isinstance(answer, str)]
    assert len(farm.made) <= 2 + MAX_LOST


def test_of_many_replicas_more_may_be_lost() -> None:
    farm = Farm(lives=0)
    answers = run(farm, [str(number) for number in range(100)], size=9, most=1)
    told = [str(answer) for answer in answers if isinstance(answer, ExecutorError)]
    assert "18 engines ended one after the other" in told[0]


def test_lines_that_were_lost_once_go_on_beside_each_other() -> None:
    class Dies(OneReplica):
        async def ask(self, lines: Any) -> Any:
            if self is farm.made[0]:
                self.lost.set()
            return await super().ask(lines)

    class DyingFarm(Farm):
        async def start(self, number: int) -> OneReplica:
            await asyncio.sleep(0.001)
            self.made.append(Dies(self, number))
            return self.made[-1]

    farm, lines = DyingFarm(), [str(number) for number in range(6)]
    assert run(farm, lines, size=1, most=6) == [f"answer to {line}" for line in lines]
    assert [replica.most for replica in farm.made] == [6, 6]


@pytest.mark.parametrize("error", [StartError("replica", "no memory"), OSError("no memory")])
def test_a_replacement_that_does_not_start_is_tried_again(error: Exception) -> None:
    farm, lines = Farm(lives=5, fails={2: error, 3: error}), [str(number) for number in range(8)]
    assert run(farm, lines, size=1) == [f"answer to {line}" for line in lines]
    assert farm.num_starts == 4


def test_a_place_that_cannot_be_filled_again_stays_empty_while_there_is_another() -> None:
    class OneDies(Farm):
        async def start(self, number: int) -> OneReplica:
            replica = await super().start(number)
            replica.lives = 2 if number else 10**9
            return replica

    error = OSError("no memory")
    farm, lines = OneDies(fails={3: error, 4: error, 5: error}), [str(number) for number in range(40)]
    assert run(farm, lines) == [f"answer to {line}" for line in lines]
    assert farm.num_starts == 2 + MAX_STARTS
    assert [replica.number for replica in farm.made] == [0, 1]


@pytest.mark.parametrize("error", [StartError("replica", "no memory"), OSError("no memory")])
@pytest.mark.parametrize("size", [1, 2])
def test_the_run_ends_when_no_replica_is_left(error: Exception, size: int) -> None:
    """Whatever a start raises: nobody waits for ever."""
    farm = Farm(lives=1, fails=dict.fromkeys(range(size + 1, 100), error))
    answers = run(farm, [str(number) for number in range(20)], size=size)
    broken = [answer for answer in answers if not isinstance(answer, str)]
    assert len(broken) == 20 - size
    assert all(isinstance(one, ExecutorError) and "no memory" in str(one) for one in broken)
    assert farm.num_starts == size + size * MAX_STARTS


def test_whatever_the_first_start_raises_ends_the_run() -> None:
    farm = Farm(fails={2: OSError("no memory")})
    answers = run(farm, [str(number) for number in range(20)], most=1)
    assert "OSError: no memory" in {type(answer): str(answer) for answer in answers}[ExecutorError]


def test_an_engine_that_does_not_start_ends_the_run_and_the_others() -> None:
    farm = Farm(refuses=frozenset({1}))
    answers = run(farm, [str(number) for number in range(20)], most=1)
    assert "no memory" in {type(answer): str(answer) for answer in answers}[StartError]
    assert all(replica.ended for replica in farm.made)


def test_leaving_while_engines_start_ends_the_starts() -> None:
    async def never(number: int) -> OneReplica:
        await asyncio.Event().wait()
        raise AssertionError

    async def work() -> None:
        with pytest.raises(KeyError):
            async with EnginePool(never, size=2, most=1):
                await asyncio.sleep(0)
                raise KeyError
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(work())
