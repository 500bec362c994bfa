"""One rank inside the driver's own process: no Ray, no second process, the same calls."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dist_vlm.executor.agreement import agreed
from dist_vlm.executor.base import Executor, ExecutorError, ExecutorInfo, StagedImage, StageKind, StartError
from dist_vlm.executor.sizes import choose_num_blocks
from dist_vlm.workers import wire
from dist_vlm.workers.config import LoadReport, RankConfig
from dist_vlm.workers.failure import RankError
from dist_vlm.workers.plan import StepPlan, StepResult
from dist_vlm.workers.worker import RUNNER, Worker

if TYPE_CHECKING:
    import numpy as np


class InlineExecutor(Executor):
    """Runs each plan when it is submitted, in the caller's thread. Nothing can bound a step's time.

    num_blocks: KV blocks to allocate; None takes what fits.
    """

    def __init__(self, config: RankConfig, *, num_blocks: int | None = None, runner: str = RUNNER) -> None:
        if config.world_size != 1:
            raise ValueError(f"world_size = {config.world_size}: the inline executor runs one rank")
        self._num_blocks = num_blocks
        self._worker: Worker | None = Worker(wire.encode(dataclasses.replace(config, rank=0)), runner)
        self._started = False
        self._dead: ExecutorError | None = None
        self._staged: list[StagedImage] = []
        self._in_flight: deque[tuple[int, bytes]] = deque()
        self.last_results: tuple[StepResult, ...] = ()

    def start(self) -> ExecutorInfo:
        if self._started or self._worker is None:
            raise ExecutorError("start", "the executor was started before")
        self._started = True
        try:
            self._worker.prepare("127.0.0.1", 0.0)
            report = wire.decode(LoadReport, self._worker.load())
            num_blocks = choose_num_blocks([report], self._num_blocks)
            self._worker.allocate(num_blocks)
        except RankError as error:
            self.shutdown()
            raise StartError(error.stage, error.cause, error.rank) from None
        except StartError:
            self.shutdown()
            raise
        return ExecutorInfo(num_blocks=num_blocks, reports=(report,))

    def stage(self, key: str, kind: StageKind, array: np.ndarray) -> None:
        worker = self._alive()
        # As with several ranks, the rank sees memory that it must not write to.
        view = array.view()
        view.flags.writeable = False
        try:
            worker.stage(key, kind, view)
        except RankError as error:
            self._staged.append(StagedImage(key=key, error=error.cause))
        else:
            self._staged.append(StagedImage(key=key, error=None))

    def poll_staged(self) -> Sequence[StagedImage]:
        self._alive()
        staged, self._staged = self._staged, []
        return staged

    def unstage(self, key: str) -> None:
        worker = self._alive()
        self._staged = [image for image in self._staged if image.key != key]
        worker.unstage(key)

    def submit(self, plan: StepPlan) -> None:
        worker = self._alive()
        try:
            self._in_flight.append((plan.step_id, worker.step(wire.encode(plan))))
        except RankError as error:
            self._dead = ExecutorError(error.stage, error.cause, error.rank)
            raise self._dead from None

    def collect(self) -> StepResult:
        self._alive()
        if not self._in_flight:
            raise ExecutorError("step", "collect() with no plan submitted")
        step_id, answer = self._in_flight.popleft()
        self.last_results = (wire.decode(StepResult, answer),)
        return agreed(self.last_results, step_id)

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _alive(self) -> Worker:
        if self._dead is not None:
            raise self._dead
        if self._worker is None or not self._started:
            raise ExecutorError("step", "the executor is not running")
        return self._worker
