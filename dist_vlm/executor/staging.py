"""Images on their way to ranks on another machine: each is put into Ray's object store once, and read from there by
every rank."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dist_vlm.executor.base import StagedImage, StageKind
from dist_vlm.executor.errors import is_death, rank_error
from dist_vlm.workers.failure import describe

if TYPE_CHECKING:
    import numpy as np

# The ranks' concurrency group that takes images.
GROUP = "staging"
# Ray keeps some KB about every call of the last hundred thousand, unless told not to.
_OPTIONS = {"concurrency_group": GROUP, "enable_task_events": False}
# How long a call waits for the one before it on the same key.
_ORDER_S = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Sent:
    """array: the reference that keeps the image in the object store, where a rank reads it in place. answers: one a
    rank."""

    array: Any
    answers: list[Future[None]]


class ImageStaging:
    """Stages by plain actor calls, in a concurrency group of their own: they run beside the steps.

    To put an image into the store takes longer than to send a plan, so a thread of its own does it, and answers are
    taken by Ray's own thread: no method of this class calls Ray or waits, `wait` and `close` apart.
    """

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = actors
        self._news = threading.Event()
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="staging")
        self._sent: dict[str, Future[_Sent]] = {}
        # The sender's alone: the ranks' answers to the last call that withdrew a key.
        self._withdrawn: dict[str, list[Future[None]]] = {}
        self._arriving: dict[str, Future[_Sent]] = {}

    def stage(self, key: str, kind: StageKind, array: np.ndarray) -> None:
        if key in self._sent:
            raise ValueError(f"image {key!r} is staged already")
        self._sent[key] = self._arriving[key] = self._sender.submit(self._send, key, kind, array)
        self._sent[key].add_done_callback(self._tell)

    def poll(self) -> list[StagedImage]:
        """Images that every rank has answered for since the last call, and those that could not be sent."""
        self._news.clear()
        images = [StagedImage(key, _error(sent)) for key, sent in self._arriving.items() if _has_ended(sent)]
        for image in images:
            del self._arriving[image.key]
        return images

    def unstage(self, key: str) -> None:
        if key not in self._sent:
            raise ValueError(f"image {key!r} is not staged")
        sent = self._sent.pop(key)
        self._arriving.pop(key, None)
        self._sender.submit(self._withdraw, key, sent)

    def advance(self) -> None:
        """Nothing: the sender goes on by itself."""

    def wait(self, timeout_s: float) -> None:
        """Until `poll` may have something to tell, or so long."""
        self._news.wait(timeout_s)

    def close(self) -> None:
        """Sends no more. Waits for what is being sent: where Ray ends meanwhile, a call would start another one."""
        self._sender.shutdown(cancel_futures=True)

    def _tell(self, _: Future[Any]) -> None:
        """In any thread."""
        self._news.set()

    # ------------------------------------------------------ the sender's thread

    def _send(self, key: str, kind: StageKind, array: np.ndarray) -> _Sent:
        import ray

        stored = ray.put(array)
        _await(self._withdrawn.pop(key, ()))
        calls = [actor.stage.options(**_OPTIONS).remote(key, kind, stored) for actor in self._actors]
        answers = [call.future() for call in calls]
        for answer in answers:
            answer.add_done_callback(self._tell)
        return _Sent(stored, answers)

    def _withdraw(self, key: str, sent: Future[_Sent]) -> None:
        if sent.exception() is None:
            _await(sent.result().answers)
        answers = [actor.unstage.options(**_OPTIONS).remote(key).future() for actor in self._actors]
        for done in [key for key, old in self._withdrawn.items() if all(answer.done() for answer in old)]:
            del self._withdrawn[done]
        self._withdrawn[key] = answers
        for answer in answers:
            answer.add_done_callback(_log_failure)


def _await(answers: Collection[Future[None]]) -> None:
    """Ray keeps no order among the calls of a concurrency group, so a call on a key waits for the one before it. Of a
    rank that does not answer nothing can be expected anyway."""
    wait(answers, timeout=_ORDER_S)


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
