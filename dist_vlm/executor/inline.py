"""One rank inside the driver's own process: no Ray, no second process, the same calls."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from dist_vlm.executor.base import Executor, ExecutorError, ExecutorInfo, StagedImage, StageKind, StartError
from dist_vlm.executor.in_flight import PlansInFlight
from dist_vlm.executor.sizes import choose_num_blocks
from dist_vlm.executor.thread_transport import ThreadTransport
from dist_vlm.executor.transport import TransportClosedError
from dist_vlm.workers import wire
from dist_vlm.workers.config import LoadReport, RankConfig
from dist_vlm.workers.failure import RankError, describe
from dist_vlm.workers.plan import StepPlan, StepResult
from dist_vlm.workers.worker import RUNNER, Worker

if TYPE_CHECKING:
    import numpy as np

# Nothing can end a step of this process, so nothing bounds how long one is waited for: 30 years.
_FOREVER_S = 1e9

_log = logging.getLogger(__name__)


class InlineExecutor(Executor):
    """Runs the rank in a thread of its own, so that a step computes while the driver plans the next.

    num_blocks: KV blocks to allocate; None takes what fits.
    max_steps_in_flight: plans that may be submitted and not collected.
    """

    serves_logits_processors: ClassVar[bool] = True

    def __init__(
        self,
        config: RankConfig,
        *,
        num_blocks: int | None = None,
        max_steps_in_flight: int = 4,
        runner: str = RUNNER,
    ) -> None:
        if config.world_size != 1:
            raise ValueError(f"world_size = {config.world_size}: the inline executor runs one rank")
        self._num_blocks = num_blocks
        self._max_steps_in_flight = max_steps_in_flight
        self._worker: Worker | None = Worker(wire.encode(dataclasses.replace(config, rank=0)), runner)
        self._thread: ThreadTransport | None = None
        self._dead: ExecutorError | None = None
        self._staged: list[StagedImage] = []

    def start(self) -> ExecutorInfo:
        if self._thread is not None or self._worker is None:
            raise ExecutorError("start", "the executor was started before")
        worker = self._worker
        self._thread = ThreadTransport(worker.step, depth=self._max_steps_in_flight + 1)
        self._plans = PlansInFlight(self._thread, num_ranks=1, limit=self._max_steps_in_flight)
        try:
            # In the thread of the steps: torch's number of threads is a thread's own setting, and the driver keeps its.
            self._thread.call(worker.prepare, "127.0.0.1", 0.0)
            report = wire.decode(LoadReport, self._thread.call(worker.load))
            num_blocks = choose_num_blocks([report], self._num_blocks)
            self._thread.call(worker.allocate, num_blocks)
        except BaseException as error:
            self.shutdown()
            if isinstance(error, RankError):
                raise StartError(error.stage, error.cause, error.rank) from None
            raise
        return ExecutorInfo(num_blocks=num_blocks, reports=(report,))

    def stage(self, key: str, kind: StageKind, array: np.ndarray) -> None:
        worker, _ = self._alive()
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
        worker, _ = self._alive()
        self._staged = [image for image in self._staged if image.key != key]
        try:
            worker.unstage(key)
        except RankError as error:
            _log.error("an image could not be unstaged: %s", describe(error))

    def submit(self, plan: StepPlan) -> None:
        self._alive()
        try:
            self._plans.submit(plan)
        except TransportClosedError as error:
            raise self._fail(error) from None

    def collect(self) -> StepResult:
        self._alive()
        if self._plans.oldest is None:
            raise ExecutorError("step", "collect() with no plan submitted")
        try:
            self.last_results = self._plans.collect(_FOREVER_S)
        except (RankError, TransportClosedError, wire.WireError, ExecutorError) as error:
            raise self._fail(error) from None
        return self.last_results[0]

    def set_processors(self, name: str, processors: Sequence[Callable[..., Any]] | None) -> None:
        worker, thread = self._alive()
        # In order with the plans: one in flight may still name what is forgotten here.
        thread.post(worker.set_processors, name, processors)

    def heard_at(self) -> tuple[float, ...]:
        """The rank is this process: an idle one is heard now, one in a step has not been heard since it began."""
        if self._thread is None:
            return ()
        busy_since = self._thread.busy_since
        return (time.monotonic() if busy_since is None else busy_since,)

    def check(self) -> None:
        self._alive()

    def shutdown(self) -> None:
        """Waits for the step under way."""
        if self._thread is not None:
            self._thread.close()
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _fail(self, error: Exception) -> ExecutorError:
        if isinstance(error, ExecutorError):
            self._dead = error
        elif isinstance(error, RankError):
            self._dead = ExecutorError(error.stage, error.cause, error.rank)
        else:
            self._dead = ExecutorError("step", describe(error), 0)
        return self._dead

    def _alive(self) -> tuple[Worker, ThreadTransport]:
        if self._dead is not None:
            raise self._dead
        if self._worker is None or self._thread is None:
            raise ExecutorError("step", "the executor is not running")
        return self._worker, self._thread
