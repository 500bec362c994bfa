"""The asynchronous API: requests come and go one by one, each streams its answer."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from dist_vlm.config import EngineConfig, resolve
from dist_vlm.engine.arg_utils import engine_config
from dist_vlm.engine.core_client import SHUT_DOWN, CoreClient
from dist_vlm.engine.core_loop import CoreLoop
from dist_vlm.engine.front import Front, load_front
from dist_vlm.engine.make_core import make_core
from dist_vlm.engine.process_client import ProcessClient
from dist_vlm.engine.request_log import RequestLog
from dist_vlm.engine.state import EngineState
from dist_vlm.engine.streams import Stream, StreamTable
from dist_vlm.executor.base import Executor, ExecutorError, ExecutorInfo
from dist_vlm.inputs import PromptInputs
from dist_vlm.machine import usable_cores
from dist_vlm.outputs import RequestOutput
from dist_vlm.sampling import SamplingParams
from dist_vlm.sched.scheduler import SchedulerStats

_log = logging.getLogger(__name__)

# Threads that tokenize, decode and resize. Most of that work is done outside Python's lock.
_MAX_PREPARERS = 8

_SHUT_DOWN = "this AsyncLLM is shut down"


class AsyncLLM:
    """A vision-language model on tensor-parallel ranks, for requests that come one by one.

    It takes the arguments of `LLM`, and raises what `LLM` raises; making one blocks until the ranks have started. The
    engine runs in a thread of its own, or with `engine_process=True` in a process of its own. Tokenizing and decoding
    pictures run in a few threads; nothing heavy runs in an event loop. It may be used from several event loops.

    Use it as an asynchronous context manager, or call `shutdown()`, to end the ranks before the process ends.
    """

    def __init__(self, model: str, tokenizer: str | None = None, **kwargs: Any) -> None:
        self._start(resolve(engine_config(model=model, tokenizer=tokenizer, **kwargs)))

    @classmethod
    def from_config(
        cls,
        config: EngineConfig,
        *,
        executor: Executor | None = None,
        client: CoreClient | None = None,
        chat_template: str | None = None,
    ) -> AsyncLLM:
        """From a configuration, resolved or not.

        executor: takes the place of the one the configuration names, for example a `FakeExecutor` in tests.
        client: a core that was not started, in place of one in this process or beside it: several replicas, say.
        chat_template: a template, as its text or its file, in place of the checkpoint's own.
        """
        llm = cls.__new__(cls)
        llm._start(resolve(config), executor, client, chat_template)
        return llm

    def _start(
        self,
        config: EngineConfig,
        executor: Executor | None = None,
        client: CoreClient | None = None,
        chat_template: str | None = None,
    ) -> None:
        if client is None:
            client = _new_client(config, executor)
        self.config = config
        self._is_draining = False
        self._client = client
        self._streams = StreamTable(self._client)
        self._preparers = ThreadPoolExecutor(min(_MAX_PREPARERS, usable_cores()), thread_name_prefix="prepare")
        self._finalizer = weakref.finalize(self, _end, self._client, self._streams, self._preparers)
        try:
            # The tokenizer and the image processor load while the ranks start.
            loading = self._preparers.submit(_load_front, config, self._client.serves_logits_processors, chat_template)
            if config.parallel.executor == "inline" and not config.parallel.engine_process:
                loading.result()  # two threads that import parts of one library may meet half a module
            self.executor_info: ExecutorInfo = self._client.start(self._streams.take)
            self._front: Front = loading.result()
        except BaseException:
            self.shutdown()
            raise

    # --------------------------------------------------------------- requests

    async def generate(
        self,
        inputs: PromptInputs,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answers one prompt; yields its output each time it has grown, whole so far, a copy of the caller's own.

        inputs: in any form of `dist_vlm.inputs`. sampling_params: None takes `SamplingParams()`.
        request_id: names the request for `abort`; None takes a number. priority: lower runs first.

        The last output, and no other, has `finished` set; it has `error` set if the request failed in the engine. A
        slow consumer gets several steps' tokens at once. One that leaves early (`aclose`, or a cancelled task) aborts
        the request. The first iteration raises `ValueError` for a request that cannot be served, `ExecutorError` if
        the ranks are lost, and `RuntimeError` while draining or after a shutdown.
        """
        self._check_admits()
        params = SamplingParams() if sampling_params is None else sampling_params
        if isinstance(params, SamplingParams):
            params = params.clone()  # the request is prepared later, and the caller may reuse what it gave
        stream = self._streams.open(request_id, asyncio.get_running_loop())
        try:
            self._submit(stream, inputs, params, priority)
            finished = False
            while not finished:
                output = await stream.next()
                finished = output.finished
                yield output
        finally:
            self._streams.end(stream, "abort")

    async def abort(self, request_id: str) -> None:
        """Ends a request: its stream's last output has the finish reason "abort". Nothing if it has ended already."""
        stream = self._streams.find(request_id)
        if stream is not None:
            self._streams.end(stream, "abort")

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Admits no request from here on and waits for those in flight; true if all have ended in time.

        timeout_s: None waits as long as it takes. What has not ended then goes on, until a `shutdown`.
        """
        self._is_draining = True
        try:
            await asyncio.wait_for(asyncio.wrap_future(self._streams.all_ended()), timeout_s)
        except TimeoutError:
            return False
        return True

    # ------------------------------------------------------------------ state

    @property
    def num_unfinished(self) -> int:
        """Requests that have come and not ended, those being prepared included."""
        return len(self._streams)

    @property
    def is_running(self) -> bool:
        """Whether the engine works: false once it is shut down or its ranks are lost."""
        return self._finalizer.alive and not self.errored

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def errored(self) -> bool:
        return self.dead_error is not None

    @property
    def dead_error(self) -> ExecutorError | None:
        """Why the engine cannot go on, None while it can."""
        return self._client.dead

    async def check_health(self) -> None:
        """Raises `ExecutorError` if the engine cannot go on, `RuntimeError` after a shutdown."""
        self._check_alive()

    async def wait_dead(self) -> ExecutorError:
        """Waits until the engine cannot go on, and returns why. Raises `RuntimeError` if it is shut down before."""
        dead = await asyncio.wrap_future(self._client.ended())
        if dead is None:
            raise RuntimeError(_SHUT_DOWN)
        return dead

    async def stats(self) -> SchedulerStats:
        """The scheduler's counts since the start. Raises what `state` raises."""
        return (await self.state()).stats

    async def state(self) -> EngineState:
        """What the engine holds, once the step under way has ended.

        Raises `ExecutorError` if the engine cannot go on, `RuntimeError` after a shutdown.
        """
        self._check_alive()
        return await asyncio.wrap_future(self._client.state())

    async def silence_s(self) -> tuple[float, ...]:
        """Seconds since each rank last finished a step or answered a ping, in rank order. Waits for no step.

        Raises what `state` raises. An engine process that is stopped does not answer, so give the wait a limit, as
        `asyncio.wait_for` does.
        """
        self._check_alive()
        return await asyncio.wrap_future(self._client.silence())

    @property
    def front(self) -> Front:
        """The checkpoint's facts, its tokenizer, and what makes requests of prompts and chats. To be read only."""
        return self._front

    def get_tokenizer(self) -> Any:
        """The tokenizer, a `transformers` one."""
        return self._front.tokenizer

    def shutdown(self) -> None:
        """Ends the ranks; requests in flight end with an error. Blocks for it. May be called more than once."""
        self._finalizer()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.shutdown)

    def _check_admits(self) -> None:
        self._check_alive()
        if self._is_draining:
            raise RuntimeError("this AsyncLLM is draining: it takes no more requests")

    def _check_alive(self) -> None:
        if self.dead_error is not None:
            raise self.dead_error
        if not self._finalizer.alive:
            raise RuntimeError(_SHUT_DOWN)

    # ---------------------------------------------------- a preparing thread's

    def _submit(self, stream: Stream, inputs: Any, params: SamplingParams, priority: int) -> None:
        try:
            self._preparers.submit(self._prepare, stream, inputs, params, priority)
        except RuntimeError:  # shut down meanwhile
            self._streams.end(stream, "error", SHUT_DOWN)

    def _prepare(self, stream: Stream, inputs: Any, params: SamplingParams, priority: int) -> None:
        """Takes a request from its client's form into the core. Does not raise."""
        if stream.is_over:
            return
        try:
            processed = self._front.processor.process(stream.engine_id, inputs, params, priority=priority)
            log = RequestLog(
                processed, params, tokenizer=self._front.tokenizer, eos_token_ids=self._front.spec.eos_token_ids
            )
        except ValueError as error:
            self._streams.refuse(stream, error)
        except Exception as error:
            # What a library says may quote memory: it goes to the log alone.
            _log.exception("request %s could not be prepared", stream.request_id)
            cause = f"the request could not be prepared ({type(error).__name__})"
            self._streams.end(stream, "error", cause)
        else:
            if self._streams.begin(stream, log):
                if log.processors_name:
                    self._client.set_processors(log.processors_name, params.logits_processors)
                for request in processed.requests:
                    self._client.add(request)
                if stream.is_over:  # its end may have overtaken what was just handed over
                    self._streams.withdraw(stream)


def _new_client(config: EngineConfig, executor: Executor | None) -> CoreClient:
    """Raises `ValueError` for what an AsyncLLM cannot be by itself."""
    if config.parallel.replicas != 1:
        raise ValueError(
            f"replicas = {config.parallel.replicas}: an AsyncLLM drives one tensor-parallel group; must be 1 here "
            "(`dist-vlm serve` serves several)"
        )
    if not config.observability.disable_log_stats:
        raise ValueError("disable_log_stats = False: not served by this version; leave it at True")
    if config.parallel.engine_process and executor is not None:
        raise ValueError(
            f"executor of type {type(executor).__name__}: cannot enter the engine's process; must be None with "
            "engine_process = True"
        )
    return ProcessClient(config) if config.parallel.engine_process else CoreLoop(make_core(config, executor))


def _load_front(config: EngineConfig, serves_logits_processors: bool, chat_template: str | None) -> Front:
    front = load_front(config, serves_logits_processors=serves_logits_processors, chat_template=chat_template)
    # A first use sets it to cut off and pad nothing. From here on threads only read it.
    front.tokenizer.encode("a")
    return front


def _end(client: CoreClient, streams: StreamTable, preparers: ThreadPoolExecutor) -> None:
    preparers.shutdown(wait=False, cancel_futures=True)
    streams.end_all(SHUT_DOWN)
    client.shutdown()
