"""The step loop: requests in, plans out to the ranks, tokens back."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Sequence

from dist_vlm.engine.messages import EngineOutput, EngineRequest
from dist_vlm.engine.staging import StagingArea
from dist_vlm.engine.state import EngineState
from dist_vlm.executor.base import Executor, ExecutorInfo
from dist_vlm.sampling import LogitsProcessor
from dist_vlm.sched.block_pool import BlockPool
from dist_vlm.sched.features import FeatureTable
from dist_vlm.sched.request import Request
from dist_vlm.sched.scheduler import Scheduler, SchedulerStats, Update

_log = logging.getLogger(__name__)

# How long the loop sleeps when all there is to do is wait for images to reach the ranks.
_STAGING_POLL_S = 0.0002
# The books of some ten thousand blocks take milliseconds to be proved one by one.
_FULL_CHECK_S = 1.0


class EngineCore:
    """Owns the scheduler and drives the executor. Not safe for use from several threads, `silence` apart.

    depth: plans in flight at most: with two, the ranks compute one while the driver works on the other.
    feature_rows: most feature rows of encoded images the ranks hold at once; None is unlimited.
    keep_features: whether they hold them for later requests.
    staging_timeout_s: how long an image may take to reach the ranks before its requests fail.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        depth: int = 1,
        enable_prefix_caching: bool = True,
        feature_rows: int | None = None,
        keep_features: bool = True,
        staging_timeout_s: float = 60.0,
    ) -> None:
        self._executor = executor
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._depth = depth
        self._enable_prefix_caching = enable_prefix_caching
        self._feature_rows = feature_rows
        self._keep_features = keep_features
        self._staging = StagingArea(executor, timeout_s=staging_timeout_s)
        self._images: dict[str, tuple[str, ...]] = {}
        self._last_submitted = -1
        self._last_collected = -1
        self._checked_at = -math.inf

    def start(self) -> ExecutorInfo:
        """Starts the ranks. Raises `StartError`, or `ValueError` if the longest sequence does not fit the KV cache."""
        info = self._executor.start()
        capacity = info.num_blocks * self._block_size
        if capacity < self._max_model_len:
            self._executor.shutdown()
            raise ValueError(
                f"the KV cache holds {capacity} tokens ({info.num_blocks} blocks of {self._block_size}), fewer than "
                f"max_model_len = {self._max_model_len}: raise kv_cache_memory_gib or gpu_memory_utilization, or lower "
                f"max_model_len to at most {capacity}"
            )
        self.scheduler = Scheduler(
            pool=BlockPool(info.num_blocks, self._block_size),
            max_num_seqs=self._max_num_seqs,
            max_num_batched_tokens=self._max_num_batched_tokens,
            features=FeatureTable(self._feature_rows, keep=self._keep_features),
            enable_prefix_caching=self._enable_prefix_caching,
        )
        return info

    @property
    def stats(self) -> SchedulerStats:
        return self.scheduler.stats

    def state(self) -> EngineState:
        scheduler, staging = self.scheduler, self._staging
        return EngineState(
            stats=copy.copy(scheduler.stats),
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_staging=staging.num_waiting,
            num_blocks=scheduler.pool.num_blocks,
            num_held_blocks=scheduler.pool.num_held,
            num_cached_blocks=scheduler.pool.num_cached,
            num_feature_rows=scheduler.features.num_rows,
            feature_row_capacity=scheduler.features.capacity_rows,
            num_staged_images=staging.num_staged,
            staged_bytes=staging.num_bytes,
        )

    def silence(self) -> tuple[float, ...]:
        """Seconds since each rank last finished a step or answered a ping, in rank order. From any thread, at once."""
        heard_at = self._executor.heard_at()
        now = time.monotonic()
        return tuple(max(0.0, now - heard) for heard in heard_at)

    def check(self) -> None:
        """Raises `ExecutorError` if ranks are lost. For when there is no work, whose steps would tell; cheap."""
        self._executor.check()

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Of the requests that have not ended."""
        return tuple(self._images)

    @property
    def serves_logits_processors(self) -> bool:
        return self._executor.serves_logits_processors

    def set_processors(self, name: str, processors: Sequence[LogitsProcessor] | None) -> None:
        """Registers logits processors under the name that a request's sampling row has; None forgets them."""
        self._executor.set_processors(name, processors)

    @property
    def staged_bytes(self) -> int:
        """Bytes of the images that requests in the engine hold on the ranks."""
        return self._staging.num_bytes

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._staging.num_waiting > 0

    def add(self, request: EngineRequest) -> None:
        """Accepts a request; from here on it ends exactly once, in an `EngineOutput` with a finish reason."""
        if request.request_id in self._images:
            raise ValueError(f"request_id {request.request_id!r} is in use")
        record = _record(request)
        self.scheduler.check_fits(record)
        self._images[request.request_id] = tuple(image.span.image for image in request.images)
        if self._staging.add(request):
            self.scheduler.add(record)

    def abort(self, request_id: str) -> list[EngineOutput]:
        """Ends a request at any moment; nothing if it has ended already."""
        if self._staging.withdraw(request_id):
            output = self._ended(EngineOutput(request_id, finish_reason="abort"))
            self._staging.collected(self._last_collected)  # no step may come that would
            return [output]
        update = self.scheduler.abort(request_id)
        return [self._output(update)] if update is not None else []

    def step(self) -> list[EngineOutput]:
        """Plans and submits what there is room for, then takes one result. Raises `ExecutorError` if ranks are lost."""
        outputs = self._admit_staged()
        while self.scheduler.num_in_flight < self._depth:
            plan = self.scheduler.plan()
            if plan is None:
                break
            self._executor.submit(plan)
            self._last_submitted = plan.step_id
        if self.scheduler.num_in_flight:
            result = self._executor.collect()
            outputs.extend(self._output(update) for update in self.scheduler.commit(result))
            self._last_collected = result.step_id
        elif self._staging.num_waiting:
            time.sleep(_STAGING_POLL_S)
        elif self.scheduler.has_work:
            for update in self.scheduler.unblock():
                _log.error("request %s can never run: %s", update.request.request_id, update.request.stop_reason)
                outputs.append(self._output(update))
        self._staging.collected(self._last_collected)
        if not self.has_work:
            self._check_books()
        return outputs

    def _check_books(self) -> None:
        """The sums whenever there is nothing to do; every block by itself less often, for an answer waits for it."""
        self.scheduler.check_sums()
        now = time.monotonic()
        if now - self._checked_at >= _FULL_CHECK_S:
            self._checked_at = now
            self.scheduler.check()

    def shutdown(self) -> None:
        self._executor.shutdown()

    def _admit_staged(self) -> list[EngineOutput]:
        if not self._staging.num_waiting:
            return []
        ready, failed = self._staging.poll()
        for request in ready:
            self.scheduler.add(_record(request))
        outputs = []
        for request, cause in failed:
            _log.error("request %s: an image did not reach the ranks: %s", request.request_id, cause)
            output = EngineOutput(request.request_id, finish_reason="error", stop_reason="an image could not be staged")
            outputs.append(self._ended(output))
        return outputs

    def _output(self, update: Update) -> EngineOutput:
        request = update.request
        output = EngineOutput(
            request_id=request.request_id,
            new_token_ids=update.new_token_ids,
            logprobs=update.logprobs,
            prompt_logprobs=update.prompt_logprobs,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            first_scheduled_time=request.first_scheduled_time,
            num_preemptions=request.num_preemptions,
            num_cached_tokens=request.num_cached_tokens,
        )
        return self._ended(output) if request.is_finished else output

    def _ended(self, output: EngineOutput) -> EngineOutput:
        keys = self._images.pop(output.request_id)
        self._staging.end(output.request_id, keys, self._last_submitted)
        return output


def _record(request: EngineRequest) -> Request:
    return Request(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        max_tokens=request.max_tokens,
        images=tuple(image.span for image in request.images),
        sampling=request.sampling,
        stop_token_ids=request.stop_token_ids,
        priority=request.priority,
        cache_salt=request.cache_salt,
        output_token_ids=list(request.output_token_ids),
        num_prompt_logprobs=request.num_prompt_logprobs,
    )
