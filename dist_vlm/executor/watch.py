"""Notices the death of any rank, whatever the driver is waiting for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from dist_vlm.executor.errors import death_cause
from dist_vlm.workers.failure import describe

_POLL_S = 1.0


class DeathWatch:
    """A thread that waits for all actors at once: each runs a call that can only end with its process.

    on_death: called once, in the watch's thread, with the rank that died first and why.
    """

    def __init__(self, actors: Sequence[Any], on_death: Callable[[int, str], None]) -> None:
        self._refs = [actor.watch.options(concurrency_group="watch").remote() for actor in actors]
        self._on_death = on_death
        self._stop = threading.Event()
        self._died = threading.Event()
        self.first: tuple[int, str] | None = None
        self._thread = threading.Thread(target=self._run, name="rank-death-watch", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> tuple[int, str] | None:
        """The first death, (rank, cause), if there is one within `timeout_s`."""
        self._died.wait(timeout_s)
        return self.first

    def stop(self) -> None:
        """Deaths from here on are ours, and not reported."""
        self._stop.set()

    def join(self) -> None:
        """Waits for the thread, which ends with the ranks."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=2 * _POLL_S)

    def _run(self) -> None:
        import ray

        # Any call of a Ray that was shut down meanwhile would start another one.
        while not self._stop.is_set() and ray.is_initialized():
            try:
                ended, _ = ray.wait(self._refs, num_returns=1, timeout=_POLL_S)
            except Exception as error:  # Ray itself is gone.
                if not self._stop.is_set():
                    self._report(0, describe(error))
                return
            if ended and not self._stop.is_set():
                self._report(self._refs.index(ended[0]), _end_of(ended[0]))
                return

    def _report(self, rank: int, cause: str) -> None:
        self.first = (rank, cause)
        self._died.set()
        self._on_death(rank, cause)


def _end_of(ref: Any) -> str:
    import ray

    try:
        ray.get(ref, timeout=0)
    except Exception as error:
        return death_cause(error)
    return "its watch ended"
