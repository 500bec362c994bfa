"""Several engines that answer lines beside each other, and are replaced when they are lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, Protocol, Self

from dist_vlm.executor.base import ExecutorError
from dist_vlm.workers.failure import describe

_log = logging.getLogger(__name__)

# Lines that were in so many engines when they were lost are given up: one of them may be what ended them.
MAX_TRIES = 3
# So many engines in a row are lost without an answer, before the run is; of many replicas, two times their number.
MAX_LOST = 10
# So often a start in the place of a lost one is tried, with pauses that grow.
MAX_STARTS = 3
PAUSE_S = 2.0


class ReplicaLost(Exception):  # noqa: N818 - what happened to it
    """The engine is of no more use. The text says why."""


class LinesGivenUp(Exception):  # noqa: N818 - what happened to them
    """No engine stayed alive with these lines. The text says so."""


class Replica(Protocol):
    async def ask(self, lines: Any) -> Any:
        """The answers. Raises `ReplicaLost`."""

    async def end(self) -> None: ...


class _Place:
    """Where a replica is, or is to be. replica: None while there is none."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.replica: Replica | None = None
        self.is_starting = False
        self.num_asked = 0


class EnginePool:
    """Gives lines to the replica that has the fewest. For one event loop; a context manager, which begins to start the
    replicas and ends them. Lines may be asked for before one is there.

    Lines of a replica that is lost go to another, or to the one that is started in its place. Those that are lost for
    the second time are tried one at a time then, so that lines which end their engine take few others with them.

    Where one of the first replicas does not start, the run ends. A place that cannot be filled again stays empty, as
    long as there is another replica.

    start: makes the replica of a place, 0 to size - 1; raises where there can be none.
    most: lines (what `ask` is called with) that a replica has at once.
    """

    def __init__(self, start: Callable[[int], Awaitable[Replica]], *, size: int, most: int) -> None:
        self._start = start
        self._most = most
        self._places = [_Place(number) for number in range(size)]
        self._changed = asyncio.Condition()
        self._suspected = asyncio.Lock()
        self._num_lost = 0
        self._max_lost = max(MAX_LOST, 2 * size)
        self._broken: ExecutorError | None = None
        self._starts: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        for place in self._places:
            self._fill(place)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for start in self._starts:
            start.cancel()
        await asyncio.gather(*self._starts, return_exceptions=True)
        for place in self._places:
            if place.replica is not None:
                await place.replica.end()

    async def ask(self, lines: Any) -> Any:
        """Raises `LinesGivenUp`, and `ExecutorError` once there are no engines any more."""
        cause = ""
        for tries in range(MAX_TRIES):
            async with AsyncExitStack() as turn:
                if tries >= 2:
                    await turn.enter_async_context(self._suspected)
                try:
                    return await self._ask(lines)
                except ReplicaLost as lost:
                    cause = str(lost)
        raise LinesGivenUp(f"{MAX_TRIES} engines ended while they had this line, the last one: {cause}")

    async def _ask(self, lines: Any) -> Any:
        place, replica = await self._free_place()
        try:
            answers = await replica.ask(lines)
        except ReplicaLost as lost:
            self._lose(place, replica, lost)
            raise
        finally:
            place.num_asked -= 1
            await self._tell()
        self._num_lost = 0
        return answers

    async def _free_place(self) -> tuple[_Place, Replica]:
        async with self._changed:
            while True:
                if self._broken is not None:
                    raise self._broken
                free = [one for one in self._places if one.replica is not None and one.num_asked < self._most]
                if free:
                    place = min(free, key=lambda one: one.num_asked)
                    place.num_asked += 1
                    assert place.replica is not None
                    return place, place.replica
                await self._changed.wait()

    def _lose(self, place: _Place, replica: Replica, lost: ReplicaLost) -> None:
        if place.replica is not replica:
            return  # told by another of its lines
        place.replica = None
        self._num_lost += 1
        if self._num_lost >= self._max_lost:
            self._broken = ExecutorError(
                "replica", f"{self._max_lost} engines ended one after the other, the last one: {lost}"
            )
        _log.warning("replica %d is lost, another is started in its place: %s", place.number, lost)
        self._fill(place, lost=replica)

    def _fill(self, place: _Place, lost: Replica | None = None) -> None:
        place.is_starting = True
        start = asyncio.create_task(self._start_in(place, lost))
        self._starts.add(start)
        start.add_done_callback(self._starts.discard)

    async def _start_in(self, place: _Place, lost: Replica | None) -> None:
        try:
            if lost is None:
                place.replica = await self._start(place.number)
            else:
                await lost.end()
                place.replica = await self._started_again(place.number)
        except Exception as error:
            if lost is None or not self._has_other(place):
                self._break(error)
            else:
                _log.error("the place of replica %d stays empty: %s", place.number, describe(error))
        finally:
            place.is_starting = False
        await self._tell()

    async def _started_again(self, number: int) -> Replica | None:
        """None where the run has ended meanwhile."""
        tries = 0
        while self._broken is None:
            tries += 1
            try:
                return await self._start(number)
            except Exception as error:
                if tries == MAX_STARTS:
                    raise
                _log.warning("replica %d does not start, it is tried again: %s", number, describe(error))
                await asyncio.sleep(tries * PAUSE_S)
        return None

    def _has_other(self, place: _Place) -> bool:
        """Whether there is another replica, or one is being started."""
        return any(one is not place and (one.replica is not None or one.is_starting) for one in self._places)

    def _break(self, error: Exception) -> None:
        if self._broken is None:
            self._broken = error if isinstance(error, ExecutorError) else ExecutorError("replica", describe(error))

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
