"""Plans to a rank in a thread of this process."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

from dist_vlm.executor.transport import Transport, TransportClosedError, TransportTimeoutError


class ThreadTransport(Transport):
    """The one thread in which a rank starts and runs: what is asked of it is done in the order of asking.

    step: the rank's `Worker.step`.

    An interpreter that exits waits for the messages sent and ends the thread; so does the end of the last reference.
    """

    def __init__(self, step: Callable[[bytes], bytes], *, depth: int) -> None:
        self._step = step
        self._depth = depth
        self._idents: list[int] = []
        self._began: list[float] = []
        # The thread must hold no reference to this object, or it would outlive it.
        idents = self._idents
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="inline-rank", initializer=lambda: idents.append(threading.get_ident())
        )
        self._unanswered: deque[Future[bytes]] = deque()

    @property
    def busy_since(self) -> float | None:
        """`time.monotonic()` at which what runs in the thread began; None if nothing runs. From any thread."""
        began = self._began[:]
        return began[0] if began else None

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a function in the thread, after all that was sent before. Returns or raises what it does."""
        return self.post(function, *arguments).result()

    def post(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """As `call`, without waiting."""
        try:
            return self._thread.submit(_timed, self._began, function, *arguments)
        except RuntimeError:  # the pool was shut down, here or by the interpreter's exit
            raise TransportClosedError("the rank's thread has ended") from None

    def send(self, message: bytes) -> None:
        if len(self._unanswered) >= self._depth:
            raise RuntimeError(f"{self._depth} messages are unanswered already")
        self._unanswered.append(self.post(self._step, message))

    def receive(self, timeout_s: float) -> list[bytes]:
        if not self._unanswered:
            raise RuntimeError("receive() with no message unanswered")
        try:
            answer = self._unanswered[0].result(timeout_s)
        except TimeoutError:
            raise TransportTimeoutError(f"no answer in {timeout_s:g} s") from None
        except CancelledError:
            raise TransportClosedError("the rank's thread has ended") from None
        # Only now: an interrupt of the wait leaves the answer to the next call.
        self._unanswered.popleft()
        return [answer]

    def close(self) -> None:
        """Waits for the step under way; messages behind it are dropped."""
        # The garbage collector, which may close an engine, runs in any thread, this one included.
        self._thread.shutdown(wait=threading.get_ident() not in self._idents, cancel_futures=True)


def _timed(began: list[float], function: Callable[..., Any], *arguments: Any) -> Any:
    """In the rank's thread: calls the function; `began` tells when, as long as it runs."""
    began.append(time.monotonic())
    try:
        return function(*arguments)
    finally:
        began.clear()
