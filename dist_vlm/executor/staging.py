"""Images on their way to the ranks: each is put into Ray's object store once, and read from there by every rank."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dist_vlm.executor.base import StagedImage, StageKind
from dist_vlm.executor.errors import rank_error
from dist_vlm.workers.failure import describe

if TYPE_CHECKING:
    import numpy as np

_GROUP = "staging"

_log = logging.getLogger(__name__)


class ImageStaging:
    """Stages by plain actor calls, in a concurrency group of their own: they run beside the steps."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = actors
        # Holding the reference keeps the array in the object store: a rank reads it in place.
        self._held: dict[str, Any] = {}
        self._arriving: dict[str, list[Any]] = {}
        self._leaving: list[Any] = []

    def stage(self, key: str, kind: StageKind, array: np.ndarray) -> None:
        import ray

        if key in self._held:
            raise ValueError(f"image {key!r} is staged already")
        ref = ray.put(array)
        self._held[key] = ref
        self._arriving[key] = [
            actor.stage.options(concurrency_group=_GROUP).remote(key, kind, ref) for actor in self._actors
        ]

    def poll(self) -> list[StagedImage]:
        """Images that every rank has answered for since the last call."""
        import ray

        self._reap()
        if not self._arriving:
            return []
        pending = [ref for refs in self._arriving.values() for ref in refs]
        _, waiting = ray.wait(pending, num_returns=len(pending), timeout=0, fetch_local=False)
        still = set(waiting)
        arrived = [key for key, refs in self._arriving.items() if still.isdisjoint(refs)]
        return [StagedImage(key=key, error=self._error(self._arriving.pop(key))) for key in arrived]

    def unstage(self, key: str) -> None:
        if key not in self._held:
            raise ValueError(f"image {key!r} is not staged")
        del self._held[key]
        self._arriving.pop(key, None)
        # One thread of the rank runs both calls, in the order they were made.
        self._leaving += [actor.unstage.options(concurrency_group=_GROUP).remote(key) for actor in self._actors]

    def _reap(self) -> None:
        import ray

        if not self._leaving:
            return
        left, self._leaving = ray.wait(self._leaving, num_returns=len(self._leaving), timeout=0)
        error = self._error(left)
        if error is not None:
            _log.error("an image could not be unstaged: %s", error)

    @staticmethod
    def _error(refs: Sequence[Any]) -> str | None:
        import ray

        for ref in refs:
            try:
                ray.get(ref, timeout=0)
            except Exception as error:
                failure = rank_error(error)
                return f"rank {failure.rank}: {failure.cause}" if failure else describe(error)
        return None
