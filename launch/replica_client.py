"""The engine core as a server with several replicas has it: each request goes to one of them, and on to another if that
one is lost.

The client keeps what a request has answered so far. A stream that breaks is sent again with it, and since sampling
depends on the request and the position alone, what comes then is what would have come.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from dist_vlm.config import EngineConfig
from dist_vlm.engine import core_messages as messages
from dist_vlm.engine.core_client import SHUT_DOWN, CoreClient, error_output
from dist_vlm.engine.messages import EngineOutput, EngineRequest
from dist_vlm.engine.state import EngineState, total
from dist_vlm.executor.base import ExecutorError, ExecutorInfo, StartError
from dist_vlm.executor.deadline import Deadline
from dist_vlm.executor.errors import death_cause, is_death
from dist_vlm.executor.ray_cluster import RayCluster
from dist_vlm.launch.replica_affinity import Claim
from dist_vlm.launch.replica_report import ReplicaReport, latest_of
from dist_vlm.launch.replica_set import ReplicaSet
from dist_vlm.sched.block_hash import BlockHasher
from dist_vlm.workers.failure import describe
from dist_vlm.workers.plan import ImageSpan
from dist_vlm.workers.wire import WireError

# Streams of one request that may break one after the other with nothing new in between: what ends every engine that it
# meets must not meet them all.
_MAX_BREAKS = 3
_LOOK_S = 0.5
_JOIN_S = 10.0

_log = logging.getLogger(__name__)


class ReplicaClient(CoreClient):
    """config: resolved. Serve restarts what is lost, so the client is never `dead`; without a replica requests wait."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__()
        self._config = config
        self._cluster = RayCluster()
        self._replicas = ReplicaSet(config)
        self._hasher = BlockHasher(config.cache.block_size)
        self._handle: Any = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._watching: list[asyncio.Task[None]] = []
        self._closing = False
        self._ending = threading.Lock()
        self._reports = _Reports()
        self._events = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._events.run_forever, name="replicas", daemon=True)

    def abort(self, request_id: str) -> None:
        self._call(self._cancel, request_id)

    def silence(self) -> Future[tuple[float, ...]]:
        """Of the replica whose ranks were all heard last: while there is one, the server serves."""
        reply: Future[tuple[float, ...]] = Future()
        error = self._end_error()
        if error is None:
            reply.set_result(self._reports.silence())
        else:
            reply.set_exception(error)
        return reply

    def replace_all(self) -> None:
        """Begins to replace every replica by a new one; no request is lost."""
        self._replicas.replace_all()

    def reports(self) -> list[ReplicaReport]:
        """What each replica that runs last told of itself."""
        return self._reports.latest

    def shutdown(self) -> None:
        self._closing = True
        self._close(SHUT_DOWN)
        with self._ending:
            if self._thread.is_alive():
                with suppress(TimeoutError):
                    asyncio.run_coroutine_threadsafe(self._cancel_all(), self._events).result(_JOIN_S)
                self._replicas.stop()
                self._events.call_soon_threadsafe(self._events.stop)
                self._thread.join(_JOIN_S)
            self._cluster.close()

    def _start(self) -> ExecutorInfo:
        parallel, number = self._config.parallel, self._config.most_replicas
        deadline = Deadline(parallel.start_timeout_s)
        self._thread.start()
        try:
            self._cluster.connect(
                parallel.ray_address,
                # A private Ray has all replicas on this machine, each with a core of its own beside its ranks'.
                num_cpus=number * (1 + parallel.tensor_parallel_size) + 1,
                use_gpus=parallel.device == "cuda",
                timeout_s=deadline.remaining_s,
            )
            deadline.lap("ray")
            handle = self._replicas.start(deadline.remaining_s)
            deadline.lap("replicas")
            started = messages.unpack(handle.info.remote().result(timeout_s=max(1.0, deadline.remaining_s)))
            if not isinstance(started, messages.Started):
                raise WireError(f"{type(started).__name__} in place of Started")
        except BaseException as error:
            self.shutdown()
            if isinstance(error, ExecutorError) or not isinstance(error, Exception):
                raise
            raise StartError("replicas", describe(error)) from None
        self._handle = handle.options(stream=True).generate
        self._call(self._begin_watching)
        return dataclasses.replace(started.info, start_seconds=deadline.laps)

    def _send_request(self, request: EngineRequest) -> None:
        self._call(self._begin, request)

    def _ask_state(self) -> None:
        """The next look answers."""

    def _call(self, function: Any, *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: all has ended
            self._events.call_soon_threadsafe(function, *arguments)

    # ---------------------------------------------------------- the client's loop

    def _begin_watching(self) -> None:
        self._reports.begin()
        self._watching = [self._events.create_task(one) for one in (self._look(), self._await_restarts())]

    async def _cancel_all(self) -> None:
        tasks = [*self._watching, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        while not self._closing:
            try:
                self._reports.take(latest_of(self._config.scaling.app_name))
                if self._reports.latest:
                    self._states.answer(self._reports.state())
            except Exception:
                _log.exception("the replicas' reports cannot be read")
            await asyncio.sleep(_LOOK_S)

    async def _await_restarts(self) -> None:
        """`dist-vlm restart` leaves its word with the anchor."""
        while not self._closing:
            try:
                await self._replicas.anchor.next_restart.remote()
                await asyncio.to_thread(self.replace_all)
            except Exception:
                _log.exception("the replicas are not replaced")
                await asyncio.sleep(_LOOK_S)

    def _begin(self, request: EngineRequest) -> None:
        task = self._events.create_task(self._drive(request))
        self._tasks[request.request_id] = task
        task.add_done_callback(lambda ended: self._end(request.request_id, ended))

    def _end(self, request_id: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(request_id, None)
        if task.cancelled():  # maybe before it began
            self._tell([EngineOutput(request_id, finish_reason="abort")])

    def _cancel(self, request_id: str) -> None:
        task = self._tasks.get(request_id)
        if task is not None:
            task.cancel()

    async def _drive(self, request: EngineRequest) -> None:
        """Tells the outputs of a request, from as many streams as it takes."""
        num_breaks = 0
        while True:
            num_told = len(request.output_token_ids) + request.num_prompt_logprobs
            is_first = not num_told and not num_breaks
            cause = "its stream ended before the request"
            try:
                async for output in self._stream(request):
                    # A later replica's cache holds what the first one's did not.
                    self._tell([output if is_first else output._replace(num_cached_tokens=0)])
                    if output.finish_reason is not None:
                        return
                    request = _with(request, output)
            except asyncio.CancelledError:
                if _is_cancelled():
                    raise
                cause = "it was cancelled in its replica"
            except Exception as error:
                cause = death_cause(error) if is_death(error) else describe(error)
            if self._closing:
                return
            has_got_on = len(request.output_token_ids) + request.num_prompt_logprobs > num_told
            num_breaks = 1 if has_got_on else num_breaks + 1
            if num_breaks >= _MAX_BREAKS:
                _log.error("request %s is given up: %s", request.request_id, cause)
                text = f"{num_breaks} replicas in a row were lost with the request"
                self._tell([error_output(request.request_id, text)])
                return
            _log.warning("request %s goes on in another replica: %s", request.request_id, cause)

    async def _stream(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """A request's outputs from one replica; closing it has the replica abort the request."""
        response = self._handle.remote(messages.pack(messages.add_message(request)), claim=self._claim(request))
        is_over = False
        try:
            async for frame in response:
                message = messages.unpack(frame)
                if not isinstance(message, messages.Outputs):
                    raise WireError(f"{type(message).__name__} in place of Outputs")
                for told in message.outputs:
                    output = messages.output_of(told)
                    is_over = output.finish_reason is not None
                    yield output
        finally:
            if not is_over:
                response.cancel()

    def _claim(self, request: EngineRequest) -> Claim:
        token_ids = request.prompt_token_ids + request.output_token_ids
        digests: list[bytes] = []
        if self._config.cache.enable_prefix_caching:
            spans: list[ImageSpan] = [image.span for image in request.images]
            self._hasher.extend(
                digests,
                token_ids,
                spans,
                root=self._hasher.root(salt=request.cache_salt),
                num_blocks=len(token_ids) // self._config.cache.block_size,
            )
        return Claim(tuple(digests), len(token_ids), request.max_tokens - len(request.output_token_ids))


def _is_cancelled() -> bool:
    """Whether somebody here has cancelled this task; Serve raises the same error for a cancellation over there."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _with(request: EngineRequest, output: EngineOutput) -> EngineRequest:
    """The request as another replica is to go on with it."""
    return dataclasses.replace(
        request,
        output_token_ids=request.output_token_ids + output.new_token_ids,
        num_prompt_logprobs=request.num_prompt_logprobs + len(output.prompt_logprobs),
    )


class _Reports:
    """The replicas' reports with their age, and the counts of replicas that are gone."""

    def __init__(self) -> None:
        self.latest: list[ReplicaReport] = []
        self._told_at: dict[str, float] = {}
        self._gone: dict[str, EngineState] = {}
        self._seen_at = time.monotonic()

    def begin(self) -> None:
        """From now on there are replicas."""
        self._seen_at = time.monotonic()

    def take(self, reports: list[ReplicaReport]) -> None:
        now = time.monotonic()
        before = {report.replica_id: report for report in self.latest}
        after = {report.replica_id: report for report in reports}
        # What they have done counts on; what they held is gone.
        self._gone |= {name: one.state.only_counts() for name, one in before.items()}
        self._gone = {name: state for name, state in self._gone.items() if name not in after}
        for name, report in after.items():
            if name not in before or before[name] != report:
                self._told_at[name] = now
        self.latest = reports
        self._told_at = {name: self._told_at[name] for name in after}
        if reports:
            self._seen_at = now

    def silence(self) -> tuple[float, ...]:
        """Of the replica that was heard last, rank by rank; without any, since when there is none."""
        now = time.monotonic()
        told_at = dict(self._told_at)
        ages = [
            tuple(silent_s + now - told_at.get(report.replica_id, now) for silent_s in report.silence)
            for report in self.latest
        ]
        return min((age for age in ages if age), key=max, default=(now - self._seen_at,))

    def state(self) -> EngineState:
        return total([*(report.state for report in self.latest), *self._gone.values()])
