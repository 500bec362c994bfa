"""One set of started ranks, lent to many engines in turn: starting ranks takes seconds, an engine nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dist_vlm.executor.base import Executor, ExecutorInfo, StagedImage, StageKind
from dist_vlm.workers.plan import StepPlan, StepResult

if TYPE_CHECKING:
    import numpy as np


class BorrowedExecutor(Executor):
    """Passes everything on to a started executor; `shutdown` only takes back what this loan put on the ranks.

    num_blocks: KV blocks to claim, at most what the ranks have; None claims all.
    """

    def __init__(self, lender: Executor, info: ExecutorInfo, *, first_step_id: int, num_blocks: int | None) -> None:
        self._lender = lender
        self.serves_logits_processors = lender.serves_logits_processors
        self._info = dataclasses.replace(info, num_blocks=num_blocks or info.num_blocks)
        assert self._info.num_blocks <= info.num_blocks
        self._offset = first_step_id
        self.next_step_id = first_step_id
        self._slots: set[int] = set()
        self._features: set[str] = set()
        self._staged: set[str] = set()
        self._num_in_flight = 0
        self.results: list[StepResult] = []
        self.plans: list[StepPlan] = []

    def start(self) -> ExecutorInfo:
        return self._info

    def stage(self, key: str, kind: StageKind, array: np.ndarray) -> None:
        self._staged.add(key)
        self._lender.stage(key, kind, array)

    def poll_staged(self) -> Sequence[StagedImage]:
        return self._lender.poll_staged()

    def unstage(self, key: str) -> None:
        self._staged.discard(key)
        self._lender.unstage(key)

    def submit(self, plan: StepPlan) -> None:
        self._slots.difference_update(plan.release)
        self._slots.update(new.slot for new in plan.new)
        self._features.difference_update(plan.drop_features)
        self._features.update(plan.encode)
        self.plans.append(plan)
        self._lender.submit(dataclasses.replace(plan, step_id=self._offset + plan.step_id))
        self._num_in_flight += 1
        self.next_step_id = self._offset + plan.step_id + 1

    def collect(self) -> StepResult:
        result = self._lender.collect()
        self._num_in_flight -= 1
        result = dataclasses.replace(result, step_id=result.step_id - self._offset)
        self.results.append(result)
        return result

    def set_processors(self, name: str, processors: Sequence[Callable[..., Any]] | None) -> None:
        self._lender.set_processors(name, processors)

    def heard_at(self) -> tuple[float, ...]:
        return self._lender.heard_at()

    def check(self) -> None:
        self._lender.check()

    def shutdown(self) -> None:
        """Leaves the ranks as they were lent: no slot taken, no feature held, no image staged."""
        while self._num_in_flight:
            self.collect()
        if self._slots or self._features:
            release, drop = tuple(self._slots), tuple(self._features)
            self._lender.submit(StepPlan(step_id=self.next_step_id, release=release, drop_features=drop))
            self._lender.collect()
            self.next_step_id += 1
            self._slots.clear()
            self._features.clear()
        for key in tuple(self._staged):
            self.unstage(key)
