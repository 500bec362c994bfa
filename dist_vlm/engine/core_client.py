"""The engine core as a front sees it, in whichever thread or process it runs."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from dist_vlm.engine.messages import EngineOutput, EngineRequest
from dist_vlm.executor.base import ExecutorError, ExecutorInfo
from dist_vlm.sampling import LogitsProcessor
from dist_vlm.sched.scheduler import SchedulerStats

OnOutputs = Callable[[list[EngineOutput]], None]

SHUT_DOWN = "the engine is shut down"


class CoreClient(ABC):
    """Safe for use from several threads; no call but `start` and `shutdown` waits for a step.

    Every added request ends exactly once, in an output with a finish reason, whatever becomes of the core.

    dead: why the core cannot go on; None while it can, and after a `shutdown` that found it well.
    serves_logits_processors: whether the core's rank can call functions of this process.
    """

    serves_logits_processors = False

    def __init__(self) -> None:
        self.dead: ExecutorError | None = None
        self._on_outputs: OnOutputs = _nobody_listens
        self._books = threading.Lock()
        self._open: set[str] = set()
        self._asked: list[Future[SchedulerStats]] = []
        self._refusal: str | None = None

    def start(self, on_outputs: OnOutputs) -> ExecutorInfo:
        """Starts the ranks. Raises `StartError`, or `ValueError` if the longest sequence does not fit the KV cache.

        on_outputs: called with the news of requests, in a thread of the core's or in that of an `add`, and at the
            core's end, then with an empty list too. It must be quick, for the next step may wait for it, and must not
            raise.
        """
        self._on_outputs = on_outputs
        return self._start()

    def add(self, request: EngineRequest) -> None:
        """Hands a request over. One that the core refuses, or that comes too late, ends with an error.

        Raises `ValueError` if a request of that id is in the core.
        """
        with self._books:
            refusal = self._refusal
            if refusal is None and request.request_id in self._open:
                raise ValueError(f"request_id {request.request_id!r} is in use")
            if refusal is None:
                self._open.add(request.request_id)
        if refusal is None:
            self._send_request(request)
        else:
            self._on_outputs([error_output(request.request_id, refusal)])

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """Ends a request at any moment; nothing if it has ended already."""

    def set_processors(self, name: str, processors: Sequence[LogitsProcessor] | None) -> None:
        """Registers logits processors under the name that a request's sampling row has; None forgets them.

        Raises `ValueError` where `serves_logits_processors` is False.
        """
        raise ValueError(f"logits_processors = {processors!r}: functions cannot enter the engine's process")

    def stats(self) -> Future[SchedulerStats]:
        """The scheduler's counts since the start; the future raises `ExecutorError` if the core is not running."""
        reply: Future[SchedulerStats] = Future()
        with self._books:
            refusal, dead = self._refusal, self.dead
            if refusal is None:
                self._asked.append(reply)
        if refusal is None:
            self._ask_stats()
        else:
            reply.set_exception(dead or ExecutorError("stats", refusal))
        return reply

    @abstractmethod
    def shutdown(self) -> None:
        """Ends the core and its ranks, and requests in flight with an error. May be called more than once."""

    # ------------------------------------------------------------ for subclasses

    @abstractmethod
    def _start(self) -> ExecutorInfo: ...

    @abstractmethod
    def _send_request(self, request: EngineRequest) -> None:
        """Passes a request on without waiting for the core."""

    @abstractmethod
    def _ask_stats(self) -> None:
        """Has the core call `_answer_stats` soon."""

    def _tell(self, outputs: Sequence[EngineOutput]) -> None:
        """Passes news on, but for requests that `_close` has ended."""
        with self._books:
            news = [output for output in outputs if output.request_id in self._open]
            self._open.difference_update(output.request_id for output in news if output.finish_reason is not None)
        if news:
            self._on_outputs(news)

    def _answer_stats(self, stats: SchedulerStats) -> None:
        with self._books:
            asked, self._asked = self._asked, []
        for reply in asked:
            if reply.set_running_or_notify_cancel():
                reply.set_result(stats)

    def _close(self, refusal: str, dead: ExecutorError | None = None) -> None:
        """Ends all requests, and those still to come, with this error. The first call counts."""
        with self._books:
            if self._refusal is not None:
                return
            self._refusal, self.dead = refusal, dead
            ended = sorted(self._open)
            self._open.clear()
            asked, self._asked = self._asked, []
        for reply in asked:
            if reply.set_running_or_notify_cancel():
                reply.set_exception(dead or ExecutorError("stats", refusal))
        self._on_outputs([error_output(request_id, refusal) for request_id in ended])


def error_output(request_id: str, cause: str) -> EngineOutput:
    return EngineOutput(request_id, finish_reason="error", stop_reason=cause)


def _nobody_listens(outputs: list[EngineOutput]) -> None:
    if outputs:
        raise RuntimeError("a request was added before start()")
