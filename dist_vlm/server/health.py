"""Whether every rank is alive, by what each was last heard to do."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from dist_vlm.async_llm import AsyncLLM
from dist_vlm.executor.base import ExecutorError
from dist_vlm.server.metrics import Metrics

_log = logging.getLogger(__name__)

_MOST_S = 1.0


class HealthMonitor:
    """Asks the engine for its ranks' last signs of life, again and again, so that a check itself waits for nothing.

    limit_s: how long a rank may be silent.
    """

    def __init__(self, llm: AsyncLLM, *, limit_s: float, metrics: Metrics) -> None:
        self._llm = llm
        self._limit_s = limit_s
        self._metrics = metrics
        self._heard_at: tuple[float, ...] = ()
        self._began_at = time.monotonic()

    def problem(self) -> str | None:
        """Why the server is not healthy; None while it is."""
        dead = self._llm.dead_error
        if dead is not None:
            # Anybody may ask, and what a library said may tell too much.
            where = "" if dead.rank is None else f" on rank {dead.rank}"
            return f"the engine has ended: {dead.stage} failed{where}; the log has the cause"
        now, limit = time.monotonic(), f"health_timeout_s = {self._limit_s:g}"
        if not self._heard_at and now - self._began_at > self._limit_s:
            return f"the engine has told nothing of its ranks for {now - self._began_at:.1f} s; {limit}"
        for rank, heard_at in enumerate(self._heard_at):
            if now - heard_at > self._limit_s:
                return f"rank {rank} finished no step and answered no ping for {now - heard_at:.1f} s; {limit}"
        return None

    async def run(self) -> None:
        """Until it is cancelled, or the engine ends."""
        # Each by itself: the state waits for the end of a step, which may take longer than the limit.
        async with asyncio.TaskGroup() as group:
            group.create_task(self._repeat(self._hear))
            group.create_task(self._repeat(self._look))

    async def _hear(self) -> None:
        silence = await self._llm.silence_s()
        now = time.monotonic()
        self._heard_at = tuple(now - silent for silent in silence)

    async def _look(self) -> None:
        self._metrics.state = await self._llm.state()

    async def _repeat(self, question: Callable[[], Awaitable[None]]) -> None:
        pause = min(_MOST_S, self._limit_s / 4)
        while not self._llm.errored:
            try:
                async with asyncio.timeout(self._limit_s):
                    await question()
            except TimeoutError:
                _log.warning("the engine did not say within %g s how it is", self._limit_s)
            except (ExecutorError, RuntimeError):
                return
            await asyncio.sleep(pause)
