"""Images on their way to the ranks: each is put into Ray's object store once, and read from there by every rank."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dist_vlm.executor.base import StagedImage, StageKind
from dist_vlm.executor.errors import is_death, rank_error
from dist_vlm.workers.failure import describe

if TYPE_CHECKING:
    import numpy as np

_GROUP = "staging"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Sent:
    """array: the reference that keeps the image in the object store: a rank reads it in place. answers: one a rank."""

    array: Any
    answers: list[Future[None]]


class ImageStaging:
    """Stages by plain actor calls, in a concurrency group of their own: they run beside the steps.

    To put an image into the store takes longer than to send a plan, so a thread of its own does it, and answers are
    taken by Ray's own thread: no method of this class calls Ray or waits, `close` apart.
    """

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = actors
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="staging")
        self._sent: dict[str, Future[_Sent]] = {}
        self._arriving: dict[str, Future[_Sent]] = {}

    def stage(self, key: str, kind: StageKind, array: np.ndarray) -> None:
        if key in self._sent:
            raise ValueError(f"image {key!r} is staged already")
        self._sent[key] = self._arriving[key] = self._sender.submit(self._send, key, kind, array)

    def poll(self) -> list[StagedImage]:
        """Images that every rank has answered for since the last call, and those that could not be sent."""
        images = [StagedImage(key, _error(sent)) for key, sent in self._arriving.items() if _has_ended(sent)]
        for image in images:
            del self._arriving[image.key]
        return images

    def unstage(self, key: str) -> None:
        if key not in self._sent:
            raise ValueError(f"image {key!r} is not staged")
        del self._sent[key]
        self._arriving.pop(key, None)
        self._sender.submit(self._withdraw, key)

    def close(self) -> None:
        """Sends no more. Waits for what is being sent: where Ray ends meanwhile, a call would start another one."""
        self._sender.shutdown(cancel_futures=True)

    # ------------------------------------------------------ the sender's thread

    def _send(self, key: str, kind: StageKind, array: np.ndarray) -> _Sent:
        import ray

        ref = ray.put(array)
        calls = [actor.stage.options(concurrency_group=_GROUP).remote(key, kind, ref) for actor in self._actors]
        return _Sent(ref, [call.future() for call in calls])

    def _withdraw(self, key: str) -> None:
        """One thread of the rank runs this call and the one before it, in the order they were made."""
        for actor in self._actors:
            actor.unstage.options(concurrency_group=_GROUP).remote(key).future().add_done_callback(_log_failure)


def _has_ended(sent: Future[_Sent]) -> bool:
    return sent.done() and (sent.exception() is not None or all(answer.done() for answer in sent.result().answers))


def _error(sent: Future[_Sent]) -> str | None:
    """Of one that has ended."""
    failed = sent.exception()
    if failed is not None:
        return describe(failed)
    errors = (_told(answer) for answer in sent.result().answers)
    return next((error for error in errors if error is not None), None)


def _told(answer: Future[None]) -> str | None:
    """What a rank's answer says went wrong."""
    error = answer.exception()
    if error is None:
        return None
    failure = rank_error(error)
    return f"rank {failure.rank}: {failure.cause}" if failure else describe(error)


def _log_failure(answer: Future[None]) -> None:
    error = answer.exception()
    if error is not None and not is_death(error):  # a rank's end is told by who watches it
        _log.error("an image could not be unstaged: %s", _told(answer))
