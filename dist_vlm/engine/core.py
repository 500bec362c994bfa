"""The step loop: requests in, plans out to the ranks, tokens back.

Where ranks are lost, others are started in their place and get all requests again, each with the tokens it has: a token
depends on those before it and on its request's own numbers, so an answer goes on as it would have, but for what
rounding makes of another batch.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Sequence

from dist_vlm.engine.held_request import HeldRequest, ReturnLine
from dist_vlm.engine.messages import EngineOutput, EngineRequest
from dist_vlm.engine.restart_budget import RestartBudget
from dist_vlm.engine.staging import StagingArea
from dist_vlm.engine.state import EngineState
from dist_vlm.executor.base import Executor, ExecutorError, ExecutorInfo, StartError
from dist_vlm.sampling import LogitsProcessor
from dist_vlm.sched.block_pool import BlockPool
from dist_vlm.sched.features import FeatureTable
from dist_vlm.sched.request import Request
from dist_vlm.sched.scheduler import Scheduler, SchedulerStats, Update

_log = logging.getLogger(__name__)

# How long the loop waits at most when all there is to do is wait for images to reach the ranks.
_STAGING_WAIT_S = 0.0005
# As often ranks may be lost while a request is computed and gets no token. It ends then: it may be why.
_MOST_LOSSES = 2
# The books of some ten thousand blocks take milliseconds to be proved one by one.
_FULL_CHECK_S = 1.0


class EngineCore:
    """Owns the scheduler and drives the executor. Not safe for use from several threads, `silence` apart.

    depth: plans in flight at most: with two, the ranks compute one while the driver works on the other.
    feature_rows: most feature rows of encoded images the ranks hold at once; None is unlimited.
    keep_features: whether they hold them for later requests.
    staging_timeout_s: how long an image may take to reach the ranks before its requests fail.
    max_restarts: how often in an hour lost ranks are started again. Requests' images are kept for that.
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
        max_restarts: int = 0,
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
        self._staging_timeout_s = staging_timeout_s
        self._staging = StagingArea(executor, timeout_s=staging_timeout_s)
        self._restarts = RestartBudget(max_restarts if executor.can_restart else 0)
        self._num_restarts = 0
        self._is_shut_down = False
        self._held: dict[str, HeldRequest] = {}  # in the order of their arrival
        self._untold: list[EngineOutput] = []
        self._returning = ReturnLine()
        self._last_submitted = -1
        self._last_collected = -1
        self._checked_at = -math.inf

    def start(self) -> ExecutorInfo:
        """Starts the ranks. Raises `StartError`, or `ValueError` if the longest sequence does not fit the KV cache."""
        info = self._executor.start()
        self.scheduler = self._make_scheduler(info)
        return info

    def _make_scheduler(self, info: ExecutorInfo) -> Scheduler:
        capacity = info.num_blocks * self._block_size
        if capacity < self._max_model_len:
            self._executor.shutdown()
            raise ValueError(
                f"the KV cache holds {capacity} tokens ({info.num_blocks} blocks of {self._block_size}), fewer than "
                f"max_model_len = {self._max_model_len}: raise kv_cache_memory_gib or gpu_memory_utilization, or lower "
                f"max_model_len to at most {capacity}"
            )
        return Scheduler(
            pool=BlockPool(info.num_blocks, self._block_size),
            max_num_seqs=self._max_num_seqs,
            max_num_batched_tokens=self._max_num_batched_tokens,
            features=FeatureTable(self._feature_rows, keep=self._keep_features),
            enable_prefix_caching=self._enable_prefix_caching,
        )

    @property
    def stats(self) -> SchedulerStats:
        return self.scheduler.stats

    def state(self) -> EngineState:
        scheduler, staging = self.scheduler, self._staging
        return EngineState(
            stats=copy.copy(scheduler.stats),
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_staging=staging.num_waiting + len(self._returning),
            num_blocks=scheduler.pool.num_blocks,
            num_held_blocks=scheduler.pool.num_held,
            num_cached_blocks=scheduler.pool.num_cached,
            num_feature_rows=scheduler.features.num_rows,
            feature_row_capacity=scheduler.features.capacity_rows,
            num_staged_images=staging.num_staged,
            staged_bytes=staging.num_bytes,
            num_restarts=self._num_restarts,
        )

    def silence(self) -> tuple[float, ...]:
        """Seconds since each rank last finished a step or answered a ping, in rank order. From any thread, at once."""
        heard_at = self._executor.heard_at()
        now = time.monotonic()
        return tuple(max(0.0, now - heard) for heard in heard_at)

    def check(self) -> None:
        """Raises `ExecutorError` if ranks are lost and cannot be replaced. For when there is no work, whose steps would
        tell; cheap."""
        try:
            self._executor.check()
        except ExecutorError as error:
            self._replace_ranks(error)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Of the requests that have not ended."""
        return tuple(self._held)

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
        return self.scheduler.has_work or self._staging.num_waiting > 0 or bool(self._untold or self._returning)

    def add(self, request: EngineRequest) -> None:
        """Accepts a request; from here on it ends exactly once, in an `EngineOutput` with a finish reason."""
        if request.request_id in self._held:
            raise ValueError(f"request_id {request.request_id!r} is in use")
        record = _record(request)
        self.scheduler.check_fits(record)
        held = HeldRequest(record, request if self._restarts.most_an_hour else None)
        self._held[request.request_id] = held
        if self._returning:
            self._returning.append(held)  # behind those that were here before
            return
        try:
            if self._staging.add(request):
                self.scheduler.add(record)
            else:
                self.scheduler.look_ahead(record)  # while its images are on their way
        except ExecutorError as error:
            self._replace_ranks(error)

    def abort(self, request_id: str) -> list[EngineOutput]:
        """Ends a request at any moment; nothing if it has ended already."""
        held = self._held.get(request_id)
        if self._staging.withdraw(request_id) or (held is not None and self._returning.withdraw(held)):
            output = self._ended(EngineOutput(request_id, finish_reason="abort"))
            try:
                self._staging.collected(self._last_collected)  # no step may come that would
            except ExecutorError as error:
                self._replace_ranks(error)
            return [output]
        update = self.scheduler.abort(request_id)
        return [self._output(update)] if update is not None else []

    def step(self) -> list[EngineOutput]:
        """Plans and submits what there is room for, then takes one result. Raises `ExecutorError` if ranks are lost and
        cannot be replaced."""
        try:
            self._advance()
        except ExecutorError as error:
            self._replace_ranks(error)
        outputs, self._untold = self._untold, []
        return outputs

    def _advance(self) -> None:
        for held in self._returning.take():
            self._give(held)
        self._admit_staged()
        while self.scheduler.num_in_flight < self._depth:
            plan = self.scheduler.plan()
            if plan is None:
                break
            self._executor.submit(plan)
            self._last_submitted = plan.step_id
        if self.scheduler.num_in_flight:
            result = self._executor.collect()
            self._untold.extend(self._output(update) for update in self.scheduler.commit(result))
            self._last_collected = result.step_id
        elif self._staging.num_waiting:
            self._executor.wait_staged(_STAGING_WAIT_S)
        elif self.scheduler.has_work:
            for update in self.scheduler.unblock():
                _log.error("request %s can never run: %s", update.request.request_id, update.request.stop_reason)
                self._untold.append(self._output(update))
        self._staging.collected(self._last_collected)
        if not self.scheduler.has_work and not self._staging.num_waiting and not self._returning:
            self._check_books()

    def _check_books(self) -> None:
        """The sums whenever there is nothing to do; every block by itself less often, for an answer waits for it."""
        self.scheduler.check_sums()
        now = time.monotonic()
        if now - self._checked_at >= _FULL_CHECK_S:
            self._checked_at = now
            self.scheduler.check()

    def shutdown(self) -> None:
        self._is_shut_down = True
        self._executor.shutdown()

    def _replace_ranks(self, error: ExecutorError) -> None:
        """Starts others in the place of lost ranks and gives them every request again. Raises `error` where there were
        too many losses, and an error with its cause where the start fails."""
        while True:
            if self._is_shut_down or not self._restarts.take():
                raise error
            _log.error("the ranks are started again, the %s having failed", error.stage)
            began = time.monotonic()
            self._restart(error)
            try:
                self._give_all_again()
            except ExecutorError as again:
                error = again
                continue
            _log.warning("after %.1f s the ranks go on with %d requests", time.monotonic() - began, len(self._held))
            return

    def _restart(self, error: ExecutorError) -> None:
        """What ranks are lost with is lost here: books of blocks and slots, staged images."""
        for request_id, held in self._held.items():
            held.lose(is_concerned=held.record.num_in_flight > 0 or self._staging.is_waiting(request_id))
        lost = self.scheduler
        try:
            self.scheduler = self._make_scheduler(self._executor.restart())
        except (StartError, ValueError) as failure:
            cause = f"{error.cause}; and the ranks could not be started again: {failure}"
            raise ExecutorError(error.stage, cause, error.rank) from None
        self.scheduler.count_on(lost)
        self._staging = StagingArea(self._executor, timeout_s=self._staging_timeout_s)
        self._last_submitted = self._last_collected = -1
        self._num_restarts += 1

    def _give_all_again(self) -> None:
        """In line; one with which ranks are lost again ends."""
        self._returning.clear()
        for request_id, held in list(self._held.items()):
            held.record.start_over()
            if held.num_losses >= _MOST_LOSSES:
                self._fail(request_id, f"ranks were lost {held.num_losses} times while it was computed")
            else:
                self._returning.append(held)
        for held in self._returning.take():
            self._give(held)

    def _give(self, held: HeldRequest) -> None:
        assert held.request is not None, "requests are kept where ranks may be replaced"
        if self._staging.add(held.request):
            self.scheduler.add(held.record)

    def _fail(self, request_id: str, reason: str) -> None:
        """Ends a request that is not the scheduler's."""
        _log.error("request %s: %s", request_id, reason)
        self._untold.append(self._ended(EngineOutput(request_id, finish_reason="error", stop_reason=reason)))

    def _admit_staged(self) -> None:
        if not self._staging.num_waiting:
            return
        ready, failed = self._staging.poll()
        for request in ready:
            self.scheduler.add(self._held[request.request_id].record)
        for request, cause in failed:
            _log.error("request %s: an image did not reach the ranks: %s", request.request_id, cause)
            self._fail(request.request_id, "an image could not be staged")

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
        held = self._held.pop(output.request_id)
        held.has_ended = True
        self._staging.end(output.request_id, (span.image for span in held.record.images), self._last_submitted)
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
