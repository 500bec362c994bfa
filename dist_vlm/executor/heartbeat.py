"""When each rank was last known to live: it is asked once a second, whatever the driver and the ranks are doing."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from dist_vlm.workers.failure import describe

_PERIOD_S = 1.0

_log = logging.getLogger(__name__)


class Heartbeat:
    """A thread that pings every rank once a second, but none again before it has answered.

    The pings run in a concurrency group of their own, so a rank answers while it computes a step. One whose process is
    stopped does not, and neither does one that is dead.
    """

    def __init__(self, actors: Sequence[Any]) -> None:
        self._heard_at = [time.monotonic()] * len(actors)
        self._stop = threading.Event()
        # The handles are the thread's alone: whoever keeps this object afterwards keeps no actor.
        self._thread = threading.Thread(target=self._run, args=(tuple(actors),), name="rank-heartbeat", daemon=True)
        self._thread.start()

    def heard_at(self) -> tuple[float, ...]:
        """`time.monotonic()` at which each rank was last heard, in rank order. Does not block."""
        return tuple(self._heard_at)

    def heard(self) -> None:
        """Every rank has just been heard otherwise: its answer to a plan has come."""
        self._heard_at[:] = [time.monotonic()] * len(self._heard_at)

    def stop(self) -> None:
        self._stop.set()

    def join(self) -> None:
        """Waits for the thread, after a `stop`."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=2 * _PERIOD_S)

    # ------------------------------------------------------- the heartbeat's thread

    def _run(self, actors: tuple[Any, ...]) -> None:
        unanswered: dict[Any, int] = {}
        try:
            while self._goes_on():
                end = time.monotonic() + _PERIOD_S
                for rank in set(range(len(actors))).difference(unanswered.values()):
                    unanswered[_ping(actors[rank])] = rank
                self._listen(unanswered, end)
                self._stop.wait(max(0.0, end - time.monotonic()))
        except Exception as error:  # Ray itself is gone
            if not self._stop.is_set():
                _log.warning("the ranks can no longer be asked whether they live: %s", describe(error))

    def _listen(self, unanswered: dict[Any, int], end: float) -> None:
        """Notes answers as they come, until `end` or until there is none to wait for."""
        import ray

        while unanswered and self._goes_on():
            ended, _ = ray.wait(list(unanswered), num_returns=1, timeout=max(0.0, end - time.monotonic()))
            if not ended:
                return
            rank = unanswered.pop(ended[0])
            if _is_answer(ended[0]):
                self._heard_at[rank] = time.monotonic()

    def _goes_on(self) -> bool:
        import ray

        # Any call of a Ray that was shut down meanwhile would start another one.
        return not self._stop.is_set() and ray.is_initialized()


def _ping(actor: Any) -> Any:
    # Not among the events that Ray keeps of every call: they would fill its memory for nothing.
    return actor.ping.options(concurrency_group="status", enable_task_events=False).remote()


def _is_answer(ref: Any) -> bool:
    import ray

    try:
        ray.get(ref, timeout=0)
    except Exception:  # the rank is dead, which the watch tells with its cause
        return False
    return True
