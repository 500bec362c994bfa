"""Health by what ranks were last heard to do, over an engine that answers as a test says, by a clock of the test's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest

from dist_vlm.async_llm import AsyncLLM
from dist_vlm.executor.base import ExecutorError
from dist_vlm.server import health as health_module
from dist_vlm.server.health import HealthMonitor
from dist_vlm.server.metrics import Metrics

from .virtual_time import run_virtually

LIMIT_S = 30.0


def now() -> float:
    return asyncio.get_running_loop().time()


class Clock:
    monotonic = staticmethod(now)


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "time", Clock)


class Engine:
    """As much of `AsyncLLM` as a monitor asks.

    silence: of each rank. answers, tells: whether it says how long its ranks have been silent, and what it holds.
    error: raised instead.
    """

    def __init__(self) -> None:
        self.silence: tuple[float, ...] = (0.0, 0.0)
        self.answers, self.tells = asyncio.Event(), asyncio.Event()
        self.answers.set()
        self.tells.set()
        self.error: Exception | None = None
        self.dead_error: ExecutorError | None = None
        self.num_asked = 0
        self.states: list[object] = []

    @property
    def errored(self) -> bool:
        return self.dead_error is not None

    async def silence_s(self) -> tuple[float, ...]:
        self.num_asked += 1
        await self.answers.wait()
        if self.error is not None:
            raise self.error
        return self.silence

    async def state(self) -> object:
        await self.tells.wait()
        if self.error is not None:
            raise self.error
        self.states.append(object())
        return self.states[-1]


class Rig:
    def __init__(self) -> None:
        self.engine, self.metrics = Engine(), Metrics("m")
        self.monitor = HealthMonitor(cast(AsyncLLM, self.engine), limit_s=LIMIT_S, metrics=self.metrics)
        self.running = asyncio.create_task(self.monitor.run())

    async def problems(self, seconds: float) -> list[str | None]:
        """Asked every tenth of a second."""
        found = []
        for _ in range(round(10 * seconds)):
            await asyncio.sleep(0.1)
            found.append(self.monitor.problem())
        return found


@asynccontextmanager
async def watched() -> AsyncIterator[Rig]:
    rig = Rig()
    try:
        yield rig
    finally:
        rig.running.cancel()
        await asyncio.gather(rig.running, return_exceptions=True)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "it leaves nothing running"


def test_ranks_that_are_heard_are_healthy_for_as_long_as_they_are() -> None:
    async def main() -> None:
        async with watched() as rig:
            rig.engine.silence = (0.0, 0.9)
            assert set(await rig.problems(200)) == {None}
            assert rig.engine.num_asked >= 190, "about once a second"
            assert rig.metrics.state is rig.engine.states[-1], "the metrics get what the engine holds"

    run_virtually(main())


def test_a_silent_rank_is_named_with_its_silence_and_the_limit_and_may_recover() -> None:
    async def main() -> None:
        async with watched() as rig:
            rig.engine.silence = (0.0, 37.25)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert rig.monitor.problem() == (
                "rank 1 finished no step and answered no ping for 37.2 s; health_timeout_s = 30"
            )
            rig.engine.silence = (0.0, 0.0)
            await asyncio.sleep(1.1)
            assert rig.monitor.problem() is None
            rig.engine.silence = (30.1, 0.0)
            await asyncio.sleep(1.1)
            assert (rig.monitor.problem() or "").startswith("rank 0 finished no step")

    run_virtually(main())


def test_a_rank_is_silent_from_the_limit_on() -> None:
    """It is told when the limit has passed, not when it is asked next."""

    async def main() -> None:
        async with watched() as rig:
            began = now()
            while now() - began < 40:
                rig.engine.silence = (0.0, now() - began)
                await asyncio.sleep(0.1)
                assert (rig.monitor.problem() is None) == (now() - began <= LIMIT_S)

    run_virtually(main())


def test_an_engine_that_stops_answering_is_a_problem_and_is_asked_again() -> None:
    async def main() -> None:
        async with watched() as rig:
            assert set(await rig.problems(10)) == {None}
            rig.engine.answers.clear()
            asked = rig.engine.num_asked
            assert set(await rig.problems(28)) == {None}
            await asyncio.sleep(2)
            problems = await rig.problems(100)
            assert all(problem is not None and problem.startswith("rank 0") for problem in problems)
            assert 3 <= rig.engine.num_asked - asked <= 6, "one question at a time"
            rig.engine.answers.set()
            await asyncio.sleep(1.1)
            assert set(await rig.problems(50)) == {None}

    run_virtually(main())


def test_an_engine_that_never_answers_has_the_limit_to_begin(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with watched() as rig:
            rig.engine.answers.clear()
            assert set(await rig.problems(29.9)) == {None}
            await asyncio.sleep(0.6)
            assert rig.monitor.problem() == "the engine has told nothing of its ranks for 30.5 s; health_timeout_s = 30"

    with caplog.at_level(logging.WARNING):
        run_virtually(main())
    (record,) = caplog.records
    assert "did not say within 30 s" in record.getMessage()


def test_a_step_longer_than_the_limit_is_no_problem_while_ranks_answer_pings() -> None:
    """The engine's state waits for the end of the step; the silence of its ranks does not."""

    async def main() -> None:
        async with watched() as rig:
            await asyncio.sleep(5)
            rig.engine.tells.clear()
            told = len(rig.engine.states)
            assert set(await rig.problems(200)) == {None}
            rig.engine.tells.set()
            assert set(await rig.problems(5)) == {None}
            assert len(rig.engine.states) > told, "the state is asked for again"

    run_virtually(main())


def test_a_dead_engine_is_a_problem_at_once_and_is_asked_no_more() -> None:
    async def main() -> None:
        async with watched() as rig:
            assert set(await rig.problems(5)) == {None}
            rig.engine.dead_error = ExecutorError("step", "/secret/path: no such file", 1)
            assert rig.monitor.problem() == "the engine has ended: step failed on rank 1; the log has the cause"
            await asyncio.wait_for(rig.running, 2)
            asked = rig.engine.num_asked
            await asyncio.sleep(100)
            assert rig.engine.num_asked == asked

    run_virtually(main())


@pytest.mark.parametrize("error", [ExecutorError("step", "it died"), RuntimeError("shut down")])
def test_an_engine_that_ends_while_it_is_asked_ends_the_monitor_and_is_not_healthy_for_long(error: Exception) -> None:
    async def main() -> None:
        async with watched() as rig:
            await asyncio.sleep(5)
            rig.engine.error = error
            await asyncio.wait_for(rig.running, 2)
            await asyncio.sleep(LIMIT_S)
            assert rig.monitor.problem() is not None

    run_virtually(main())


def test_a_defect_ends_the_monitor_whole() -> None:
    async def main() -> None:
        async with watched() as rig:
            rig.engine.answers.clear()
            rig.engine.error = KeyError("x")
            with pytest.raises(ExceptionGroup):
                await asyncio.wait_for(rig.running, 2)

    run_virtually(main())


def test_a_check_waits_for_nothing() -> None:
    async def main() -> None:
        async with watched() as rig:
            rig.engine.answers.clear()
            await asyncio.sleep(0.5)
            for _ in range(1000):
                rig.monitor.problem()
            assert rig.engine.num_asked == 1

    run_virtually(main())


@pytest.mark.parametrize(("limit_s", "pause_s"), [(300.0, 1.0), (30.0, 1.0), (0.4, 0.1)])
def test_ranks_are_asked_often_enough_for_any_limit(limit_s: float, pause_s: float) -> None:
    async def main() -> None:
        engine = Engine()
        monitor = HealthMonitor(cast(AsyncLLM, engine), limit_s=limit_s, metrics=Metrics("m"))
        running = asyncio.create_task(monitor.run())
        await asyncio.sleep(100 * pause_s)
        assert engine.num_asked == pytest.approx(100, abs=2)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    run_virtually(main())
