"""The engine core as a front sees it, in whichever thread or process it runs."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from dist_vlm.engine.messages import EngineOutput, EngineRequest
from dist_vlm.engine.question import Question
from dist_vlm.engine.state import EngineState
from dist_vlm.executor.base import ExecutorError, ExecutorInfo
from dist_vlm.sampling import LogitsProcessor

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
        self._refusal: str | None = None
        self._watchers: list[Future[ExecutorError | None]] = []
        self._questions: list[Question[Any]] = []
        self._states: Question[EngineState] = self._question(self._ask_state)

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

    def state(self) -> Future[EngineState]:
        """What the core holds, after the step under way; the future raises `ExecutorError` if the core has ended."""
        return self._states.ask()

    @abstractmethod
    def silence(self) -> Future[tuple[float, ...]]:
        """Seconds since each rank last finished a step or answered a ping, in rank order; waits for no step.

        The future raises `ExecutorError` if the core has ended. It may wait for ever for a process that is stopped, and
        can be cancelled.
        """

    def ended(self) -> Future[ExecutorError | None]:
        """Done once the core has ended: with what `dead` is then. Can be cancelled."""
        reply: Future[ExecutorError | None] = Future()
        with self._books:
            has_ended = self._refusal is not None
            if not has_ended:
                self._watchers = [one for one in self._watchers if not one.cancelled()] + [reply]
        if has_ended:
            reply.set_result(self.dead)
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
    def _ask_state(self) -> None:
        """Has the core answer `_states` soon, in a thread of its own."""

    def _question(self, send: Callable[[], None]) -> Question[Any]:
        """A question that ends with the core. send: has the core answer it soon."""
        self._questions.append(Question(send))
        return self._questions[-1]

    def _tell(self, outputs: Sequence[EngineOutput]) -> None:
        """Passes news on, but for requests that `_close` has ended."""
        with self._books:
            news = [output for output in outputs if output.request_id in self._open]
            self._open.difference_update(output.request_id for output in news if output.finish_reason is not None)
        if news:
            self._on_outputs(news)

    def _close(self, refusal: str, dead: ExecutorError | None = None) -> None:
        """Ends all requests, and those still to come, with this error. The first call counts."""
        with self._books:
            if self._refusal is not None:
                return
            self._refusal, self.dead = refusal, dead
            ended = sorted(self._open)
            self._open.clear()
            watchers, self._watchers = self._watchers, []
        for question in self._questions:
            question.end(dead or _ended(refusal))
        for watcher in watchers:
            if watcher.set_running_or_notify_cancel():
                watcher.set_result(dead)
        self._on_outputs([error_output(request_id, refusal) for request_id in ended])

    def _end_error(self) -> ExecutorError | None:
        """What one who asks the core for something gets once it has ended; None while it runs."""
        with self._books:
            return self.dead or (None if self._refusal is None else _ended(self._refusal))


def _ended(refusal: str) -> ExecutorError:
    return ExecutorError("engine", refusal)


def error_output(request_id: str, cause: str) -> EngineOutput:
    return EngineOutput(request_id, finish_reason="error", stop_reason=cause)


def _nobody_listens(outputs: list[EngineOutput]) -> None:
    if outputs:
        raise RuntimeError("a request was added before start()")
