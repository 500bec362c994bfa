"""The engine core in a thread of its own: commands come through a queue, outputs go to a callback."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue

from dist_vlm.engine.core import EngineCore
from dist_vlm.engine.core_client import SHUT_DOWN, CoreClient, error_output
from dist_vlm.engine.messages import EngineOutput, EngineRequest
from dist_vlm.executor.base import ExecutorError, ExecutorInfo
from dist_vlm.sampling import LogitsProcessor

_log = logging.getLogger(__name__)

# Commands taken between two steps: a burst of arrivals, each with images to stage, does not hold up what runs.
_COMMANDS_PER_STEP = 16
# How often an idle core looks whether its ranks are all there.
_CHECK_S = 0.5
# How long a shutdown waits for the step under way before it takes the ranks from under it, and then for the thread.
_GRACE_S = 2.0
_JOIN_S = 10.0


class CoreLoop(CoreClient):
    """Runs a core step by step while it has work; while it has none, sleeps on its queue and checks the ranks.

    The core starts in the thread that calls `start`, and belongs to the loop's thread from then on.
    """

    def __init__(self, core: EngineCore) -> None:
        super().__init__()
        self._core = core
        self.serves_logits_processors = core.serves_logits_processors
        self._commands: SimpleQueue[Callable[[], list[EngineOutput]]] = SimpleQueue()
        self._closing = False
        self._left = threading.Event()
        self._ending = threading.Lock()
        self._core_ended = False
        self._thread: threading.Thread | None = None

    def abort(self, request_id: str) -> None:
        self._commands.put(partial(self._core.abort, request_id))

    def set_processors(self, name: str, processors: Sequence[LogitsProcessor] | None) -> None:
        if not self.serves_logits_processors:
            super().set_processors(name, processors)
        self._commands.put(partial(self._set_processors, name, processors))

    def silence(self) -> Future[tuple[float, ...]]:
        reply: Future[tuple[float, ...]] = Future()
        error = self._end_error()
        if error is None:
            reply.set_result(self._core.silence())
        else:
            reply.set_exception(error)
        return reply

    def shutdown(self) -> None:
        atexit.unregister(self.shutdown)
        self._closing = True
        self._commands.put(list)  # wakes the thread
        thread = self._thread
        is_own_thread = thread is threading.current_thread()
        if thread is not None and not is_own_thread and not self._left.wait(_GRACE_S):
            _log.warning("a step was broken off: it went on for %g s after the shutdown", _GRACE_S)
        self._close(SHUT_DOWN)
        if is_own_thread:
            return  # the loop ends behind this call
        self._end_core()
        if thread is not None:
            thread.join(_JOIN_S)

    def _start(self) -> ExecutorInfo:
        info = self._core.start()
        # Registered after the executor's own, so it comes before it: no rank goes from under a step.
        atexit.register(self.shutdown)
        self._thread = threading.Thread(target=self._run, name="engine-core", daemon=True)
        self._thread.start()
        return info

    def _send_request(self, request: EngineRequest) -> None:
        self._commands.put(partial(self._add, request))

    def _ask_state(self) -> None:
        self._commands.put(self._tell_state)

    # ------------------------------------------------------- the loop's thread

    def _run(self) -> None:
        """Whatever goes wrong in here ends the engine: its books and the ranks' no longer agree."""
        try:
            while not self._closing:
                self._tell(self._take_commands())
                if self._closing:
                    break
                if self._core.has_work:
                    self._tell(self._core.step())
                else:
                    self._core.check()
        except BaseException as error:
            if not self._closing:
                self._break_off(error)
        finally:
            self._left.set()
            self._close(SHUT_DOWN)
            self._end_core()

    def _take_commands(self) -> list[EngineOutput]:
        """Waits a while for a command where there is nothing else to do."""
        outputs: list[EngineOutput] = []
        wait = not self._core.has_work
        for _ in range(_COMMANDS_PER_STEP):
            try:
                command = self._commands.get(block=wait, timeout=_CHECK_S)
            except Empty:
                break
            outputs += command()
            wait = False
        return outputs

    def _add(self, request: EngineRequest) -> list[EngineOutput]:
        try:
            self._core.add(request)
        except ValueError as error:
            return [error_output(request.request_id, str(error))]
        return []

    def _set_processors(self, name: str, processors: Sequence[LogitsProcessor] | None) -> list[EngineOutput]:
        self._core.set_processors(name, processors)
        return []

    def _tell_state(self) -> list[EngineOutput]:
        self._states.answer(self._core.state())
        return []

    def _break_off(self, error: BaseException) -> None:
        if isinstance(error, ExecutorError):
            dead = error
            _log.error("the engine ended: %s", error)
        else:
            dead = ExecutorError("step", f"the engine was broken off by {type(error).__name__}")
            _log.error("the engine ended", exc_info=error)
        self._close(str(dead), dead)

    def _end_core(self) -> None:
        with self._ending:
            if not self._core_ended:
                self._core_ended = True
                self._core.shutdown()
