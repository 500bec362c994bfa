"""An executor without ranks, for tests of everything above it: it answers from a script and checks every plan."""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from dist_vlm.executor.base import Executor, ExecutorError, ExecutorInfo, StagedImage, StageKind, StartError
from dist_vlm.executor.contract import ContractError, Ledger, Limits, Script
from dist_vlm.workers.config import LoadReport
from dist_vlm.workers.plan import StepPlan, StepResult

if TYPE_CHECKING:
    import numpy as np


def checksum_token(token_ids: Sequence[int], position: int) -> int:
    """A token in [0, 1000) that depends on every token before `position` and on nothing else."""
    return zlib.crc32(repr((tuple(token_ids[:position]), position)).encode()) % 1000


class FakeExecutor(Executor):
    """Keeps the books of a rank, computes nothing, and raises `ContractError` on a plan no rank could run.

    num_blocks, block_size, max_num_seqs, max_num_batched_tokens, max_model_len: the rank's sizes; None is
        unlimited.
    next_token: (token ids before the position, position) -> the sampled token; by default a checksum, so that
        a sequence gets the same tokens however it was cut, batched or preempted.
    fail_images, fail_stage: content key -> reason: the encoding fails, or the staging does.
    fail_slots: (step id, slot) -> reason: that slice fails.
    fail_steps: step id -> the error that `collect` raises in place of the step's result, and every call after it until
        a restart. Each is raised once.
    restarts: how often the ranks can be started again.
    staging_polls: calls of `poll_staged` that find nothing before an image arrives.
    step_delay_s: how long a step takes. It begins when its plan is submitted, or when the step before it ends.
    num_ranks: ranks whose load is reported and who are heard. The answers are rank 0's alone.

    plans: every plan submitted since the last start, in order. plans_before_restarts: those before each restart.
    silent_since: rank -> `time.monotonic()` at which it was last heard, for a test to set. The others are heard now.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 1024,
        block_size: int = 16,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_model_len: int | None = None,
        next_token: Callable[[Sequence[int], int], int] = checksum_token,
        fail_images: Mapping[str, str] | None = None,
        fail_stage: Mapping[str, str] | None = None,
        fail_slots: Mapping[tuple[int, int], str] | None = None,
        fail_steps: Mapping[int, ExecutorError] | None = None,
        restarts: int = 0,
        staging_polls: int = 0,
        step_delay_s: float = 0.0,
        num_ranks: int = 1,
    ) -> None:
        images, slots = dict(fail_images or {}), dict(fail_slots or {})
        limits = Limits(num_blocks, block_size, max_num_seqs, max_num_batched_tokens, max_model_len)
        script = Script(next_token, images.get, lambda step, slot: slots.get((step, slot)))
        self._new_ledger = partial(Ledger, limits, script)
        self._ledger = self._new_ledger()
        self._restarts = restarts
        self.can_restart = restarts > 0
        self._fail_stage = dict(fail_stage or {})
        self._fail_steps = dict(fail_steps or {})
        self._staging_polls = staging_polls
        self._step_delay_s = step_delay_s
        self._num_ranks = num_ranks
        self._arriving: dict[str, tuple[int, int | None]] = {}
        self._known: set[str] = set()
        self._in_flight: deque[tuple[StepPlan, StepResult, float]] = deque()
        self._last_end = 0.0
        self._state = "new"
        self._dead: ExecutorError | None = None
        self.plans: list[StepPlan] = []
        self.plans_before_restarts: list[list[StepPlan]] = []
        self.silent_since: dict[int, float] = {}

    @property
    def live_slots(self) -> tuple[int, ...]:
        """Slots that hold a sequence, as far as the plans submitted tell."""
        return tuple(sorted(self._ledger.slots))

    @property
    def held_features(self) -> tuple[str, ...]:
        """Images encoded and not dropped."""
        return tuple(sorted(self._ledger.features))

    @property
    def staged_images(self) -> tuple[str, ...]:
        """Images staged, or being staged, and not unstaged."""
        return tuple(sorted(self._known))

    def start(self) -> ExecutorInfo:
        if self._state != "new":
            raise ContractError(f"start() of an executor that is {self._state}")
        self._state = "started"
        return self._info()

    def restart(self) -> ExecutorInfo:
        if self._state != "started" or self._dead is None:
            raise ContractError("restart() of an executor that has lost no rank")
        if not self._restarts:
            raise StartError("load", "no rank is left to start")
        self._restarts -= 1
        self._dead = None
        self._ledger = self._new_ledger()
        self._arriving.clear()
        self._known.clear()
        self._in_flight.clear()
        self.plans_before_restarts.append(self.plans)
        self.plans = []
        return self._info()

    def _info(self) -> ExecutorInfo:
        blocks = self._ledger.limits.num_blocks
        return ExecutorInfo(num_blocks=blocks, reports=tuple(_report(rank, blocks) for rank in range(self._num_ranks)))

    def lose(self, error: ExecutorError) -> None:
        """The ranks are lost, as when one dies while nobody steps: every call raises this from now on."""
        self._dead = error

    def stage(self, key: str, kind: StageKind, array: np.ndarray) -> None:
        self._require_started()
        if key in self._known:
            raise ContractError(f"image {key!r} is staged twice")
        if kind not in ("coded_pixels", "pixel_values", "image_features"):
            raise ContractError(f"image {key!r} is staged as {kind!r}")
        axes, dtype = 3 if kind == "image_features" else 4, "uint8" if kind == "coded_pixels" else "float32"
        if array.ndim != axes or array.shape[0] != 1 or array.dtype.name != dtype:
            raise ContractError(f"image {key!r}: {kind} of shape {array.shape}, {array.dtype}")
        self._known.add(key)
        rows = int(array.shape[1]) if kind == "image_features" else None
        self._arriving[key] = (self._staging_polls, rows)

    def poll_staged(self) -> Sequence[StagedImage]:
        self._require_started()
        arrived = []
        for key, (polls, rows) in list(self._arriving.items()):
            if polls > 0:
                self._arriving[key] = (polls - 1, rows)
                continue
            del self._arriving[key]
            error = self._fail_stage.get(key)
            if error is None:
                self._ledger.staged[key] = rows
            arrived.append(StagedImage(key=key, error=error))
        return arrived

    def unstage(self, key: str) -> None:
        self._require_started()
        if key not in self._known:
            raise ContractError(f"image {key!r} is unstaged and was not staged")
        if any(key in plan.encode for plan, _, _ in self._in_flight):
            raise ContractError(f"image {key!r} is unstaged and an uncollected plan encodes it")
        self._known.discard(key)
        self._arriving.pop(key, None)
        self._ledger.staged.pop(key, None)

    def submit(self, plan: StepPlan) -> None:
        self._require_started()
        result = self._ledger.apply(plan)
        self.plans.append(plan)
        self._last_end = max(time.monotonic(), self._last_end) + self._step_delay_s
        self._in_flight.append((plan, result, self._last_end))

    def collect(self) -> StepResult:
        self._require_started()
        if not self._in_flight:
            raise ContractError("collect() with no plan submitted")
        plan, result, end = self._in_flight[0]
        if self._step_delay_s > 0:
            time.sleep(max(0.0, end - time.monotonic()))
        self._in_flight.popleft()
        if plan.step_id in self._fail_steps:
            self._dead = self._fail_steps.pop(plan.step_id)
        if self._dead is not None:
            raise self._dead
        self._ledger.collected = plan.step_id
        self.last_results = (result,)
        return result

    def heard_at(self) -> tuple[float, ...]:
        if self._state == "new":
            return ()
        now = time.monotonic()
        return tuple(self.silent_since.get(rank, now) for rank in range(self._num_ranks))

    def check(self) -> None:
        self._require_started()

    def shutdown(self) -> None:
        self._state = "shut down"
        self._in_flight.clear()

    def _require_started(self) -> None:
        if self._state != "started":
            raise ContractError(f"a call of an executor that is {self._state}")
        if self._dead is not None:
            raise self._dead


def _report(rank: int, num_blocks: int) -> LoadReport:
    return LoadReport(
        rank=rank,
        num_language_parameters=0,
        num_vision_parameters=0,
        weight_bytes=0,
        peak_load_bytes=0,
        kv_block_bytes=0,
        num_blocks=num_blocks,
        kernels={},
        load_us=0,
    )
