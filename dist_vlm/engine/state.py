"""What the engine core holds at one moment, for whoever watches it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from dist_vlm.sched.scheduler import SchedulerStats


@dataclass(frozen=True, slots=True)
class EngineState:
    """Taken between two steps; it does not change afterwards.

    stats: counts since the start.
    num_running, num_waiting: requests that hold a slot, and those that wait for one. num_staging: those that wait for
        their images to reach the ranks, or after a loss of ranks to be given to the new ones.
    num_blocks, num_held_blocks, num_cached_blocks: KV blocks in all, those that requests hold, and those that nobody
        holds but whose content is kept. The others are free.
    num_feature_rows, feature_row_capacity: rows of encoded images on the ranks, and most rows there at once (None: as
        many as wanted).
    num_staged_images, staged_bytes: images that requests hold on the ranks, those on their way included.
    num_restarts: how often lost ranks were started again.
    """

    stats: SchedulerStats
    num_running: int
    num_waiting: int
    num_staging: int
    num_blocks: int
    num_held_blocks: int
    num_cached_blocks: int
    num_feature_rows: int
    feature_row_capacity: int | None
    num_staged_images: int
    staged_bytes: int
    num_restarts: int

    def only_counts(self) -> EngineState:
        """Of an engine that is gone: what it has done, and nothing held."""
        counted = ("stats", "num_restarts")
        held = {field.name: 0 for field in dataclasses.fields(self) if field.name not in counted}
        return EngineState(stats=self.stats, num_restarts=self.num_restarts, **held)


def total(states: Sequence[EngineState]) -> EngineState:
    """Several engines as one: sums. A capacity that one of them has not, the sum has not."""
    sums: dict[str, int | None] = {}
    for field in dataclasses.fields(EngineState):
        if field.name != "stats":
            values = [getattr(state, field.name) for state in states]
            sums[field.name] = None if None in values else sum(values)
    counts = {
        field.name: sum(getattr(state.stats, field.name) for state in states)
        for field in dataclasses.fields(SchedulerStats)
    }
    return EngineState(stats=SchedulerStats(**counts), **sums)  # type: ignore[arg-type]
