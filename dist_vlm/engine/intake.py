"""The prompts of one run on their way to the engine: prepared ahead in a few threads, handed out in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, Protocol, TypeVar

from dist_vlm.engine.jobs import Job
from dist_vlm.sampling import SamplingParams

Result_co = TypeVar("Result_co", covariant=True)
Result = TypeVar("Result")


class Prepare(Protocol[Result_co]):
    """Makes something of a job. helpers: threads that may take parts of the work."""

    def __call__(self, request_id: str, job: Job, *, helpers: Executor | None = None) -> Result_co: ...


@dataclass(frozen=True, slots=True)
class Drawn(Generic[Result]):
    """A job and what is made of it; `prepared` returns or raises what preparing it did, and is called once."""

    request_id: str
    job: Job
    prepared: Callable[[], Result]


class Intake(Generic[Result]):
    """Draws jobs and prepares them. For one thread.

    jobs: drawn from no further than asked.
    prepare: called in a thread of `preparers` where a job has pictures; in the caller's, when the job's turn has come,
        where it has none, or is alone and waited for. One that is alone has the other threads as its helpers.
    new_id: names the next request.
    """

    def __init__(
        self, jobs: Iterator[Job], prepare: Prepare[Result], *, preparers: Executor, new_id: Callable[[], str]
    ) -> None:
        self._jobs = jobs
        self._prepare = prepare
        self._preparers = preparers
        self._new_id = new_id
        self._drawn: deque[tuple[Drawn[Result], Future[Result] | None]] = deque()
        self._has_more = True

    @property
    def is_over(self) -> bool:
        """Whether every job has been taken."""
        return not self._has_more and not self._drawn

    def draw(self, most: int, *, waits: bool = False) -> None:
        """Draws jobs until `most` are on their way, or there are no more. Raises what drawing one does.

        waits: whether the caller will wait for the first of them.
        """
        new: list[tuple[str, Job]] = []
        try:
            while self._has_more and len(self._drawn) + len(new) < most:
                job = next(self._jobs, None)
                if job is None:
                    self._has_more = False
                    break
                if isinstance(job.params, SamplingParams):
                    job = replace(job, params=job.params.clone())  # the caller may change its own for the next prompt
                new.append((self._new_id(), job))
        finally:
            self._begin(new, waits)

    def _begin(self, new: list[tuple[str, Job]], waits: bool) -> None:
        is_alone = len(self._drawn) + len(new) == 1
        for request_id, job in new:
            prepare = partial(self._prepare, request_id, job, helpers=self._preparers if is_alone else None)
            is_elsewhere = _has_pictures(job) and not (is_alone and waits)
            future = self._preparers.submit(prepare) if is_elsewhere else None
            self._drawn.append((Drawn(request_id, job, prepare if future is None else future.result), future))

    def take(self, *, wait: bool) -> Drawn[Result] | None:
        """The oldest job on its way; None if there is none, or it is not prepared yet and not to be waited for."""
        if not self._drawn:
            return None
        drawn, future = self._drawn[0]
        if future is not None and not (wait or future.done()):
            return None
        self._drawn.popleft()
        return drawn

    def close(self) -> None:
        """Gives up what is on its way. What a thread has begun ends by itself."""
        while self._drawn:
            _, future = self._drawn.popleft()
            if future is not None:
                future.cancel()
        self._has_more = False


def _has_pictures(job: Job) -> bool:
    """Whether preparing it may be worth a thread. What it holds is unchecked yet."""
    if isinstance(job.inputs, dict):
        return job.inputs.get("multi_modal_data") is not None
    # Another mapping may have to open its pictures to tell.
    return isinstance(job.inputs, Mapping) and "multi_modal_data" in job.inputs
