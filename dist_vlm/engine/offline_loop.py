"""The loop of the offline API: takes prompts in as the engine has room for them, and tells each call its own news."""

from __future__ import annotations

import itertools
import logging
import math
import time
import weakref
from collections import deque
from collections.abc import Collection, Generator, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from typing import Any

from dist_vlm.engine.core import EngineCore
from dist_vlm.engine.front import Front
from dist_vlm.engine.intake import Drawn, Intake
from dist_vlm.engine.jobs import Job
from dist_vlm.engine.messages import EngineOutput
from dist_vlm.engine.processor import ProcessedPrompt
from dist_vlm.engine.request_log import RequestLog
from dist_vlm.executor.base import ExecutorError
from dist_vlm.outputs import CompletionOutput, RequestOutput

_log = logging.getLogger(__name__)

_Prepared = tuple[ProcessedPrompt, RequestLog]

# Requests on their way to the engine at once, and let in between two steps at most: pictures are decoded as they are
# needed.
_MAX_DRAWN = 16
# Letting requests in takes about this share of the time that the step before took: with two plans in flight the ranks
# do not notice. One is let in at any rate.
_INTAKE_SHARE = 0.25
_MIN_INTAKE_S = 0.001
# Beyond this, pictures wait in the caller's form; at least one request is always let in.
_MAX_STAGED_BYTES = 512 << 20


class OfflineLoop:
    """Runs a started core in the threads of its callers, one at a time.

    preparers: threads that prepare requests with pictures ahead of their turn.
    ending: ends the ranks when called; alive until then.
    """

    def __init__(
        self,
        core: EngineCore,
        front: Front,
        *,
        max_num_seqs: int,
        preparers: Executor,
        ending: weakref.finalize[Any, Any],
    ) -> None:
        self._core = core
        self._front = front
        self._max_num_seqs = max_num_seqs
        self._preparers = preparers
        self._ending = ending
        self._dead: ExecutorError | None = None
        self._ids = itertools.count()
        self._step_s = 0.0
        # What a step told of requests whose run was not the one that asked for the step.
        self._news: deque[EngineOutput] = deque()

    def run(self, jobs: Iterator[Job], *, raise_errors: bool, only_ends: bool = False) -> Iterator[RequestOutput]:
        """Works jobs off and yields their outputs. Several runs may be under way: each step serves all of them.

        only_ends: yields each output once, when it is finished; its text need not grow before.
        """
        mine: dict[str, RequestLog] = {}
        prepare = partial(self._prepare, only_end=only_ends)
        intake = Intake(jobs, prepare, preparers=self._preparers, new_id=lambda: str(next(self._ids)))
        try:
            while mine or not intake.is_over:
                yield from self._submit_some(intake, mine, raise_errors=raise_errors)
                for news in self._news_of(mine) if mine else ():
                    if news.request_id not in mine:
                        continue  # its request ended with an answer beside it
                    output = self._take(news, mine)
                    if output.error is not None and raise_errors:
                        raise ValueError(f"the request failed: {output.error}")
                    if output.finished or not only_ends:
                        yield output
        finally:
            intake.close()
            for log in {id(log): log for log in mine.values()}.values():
                self._abort(log.request_ids, mine)
                self._forget_processors(log)
            self._settle()

    def _settle(self) -> None:
        """Where no request is left, takes the steps still in flight, so that nothing stays held until the next run."""
        while self._dead is None and self._ending.alive and self._core.has_work and not self._core.request_ids:
            self._step()

    def _news_of(self, mine: Mapping[str, RequestLog]) -> list[EngineOutput]:
        """What there is to tell of this run's requests, after a step if nothing has been told already."""
        news = [self._news.popleft() for _ in range(len(self._news))]
        if not any(one.request_id in mine for one in news):
            news.extend(self._step())
        self._news.extend(one for one in news if one.request_id not in mine)
        return [one for one in news if one.request_id in mine]

    def _take(self, news: EngineOutput, mine: dict[str, RequestLog]) -> RequestOutput:
        """Adds news to its request. What goes wrong in that fails the request alone."""
        log = mine[news.request_id]
        if news.finish_reason is not None:
            del mine[news.request_id]
        try:
            output = log.take(news)
        except Exception as error:
            _log.exception("request %s: the answer could not be detokenized", log.output.request_id)
            output = log.fail(f"the answer could not be detokenized ({type(error).__name__})")
        self._abort(log.pop_unwanted(), mine)
        if output.finished:
            self._forget_processors(log)
        return output

    def _abort(self, request_ids: Collection[str], mine: dict[str, RequestLog]) -> None:
        """Ends engine requests of this run as far as they have not ended, and what was told of them and not heard."""
        for request_id in request_ids:
            if mine.pop(request_id, None) is not None and self._dead is None:
                with self._ending_with_ranks():
                    self._core.abort(request_id)
        if request_ids:
            self._news = deque(one for one in self._news if one.request_id not in request_ids)

    def _step(self) -> list[EngineOutput]:
        """One step of the engine. Whatever goes wrong in it, an interrupt too, ends the engine: its books and the
        ranks' no longer agree."""
        self._check_alive()
        began = time.monotonic()
        with self._ending_with_ranks():
            outputs = self._core.step()
        self._step_s = time.monotonic() - began
        return outputs

    @contextmanager
    def _ending_with_ranks(self, *refusals: type[Exception]) -> Iterator[None]:
        """What is raised inside ends the engine, but for refusals of a request."""
        try:
            yield
        except refusals:
            raise
        except ExecutorError as error:
            self._dead = error
            self._ending()
            raise
        except BaseException as error:
            self._dead = ExecutorError("step", f"the engine was broken off by {type(error).__name__}")
            self._ending()
            raise

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise self._dead
        if not self._ending.alive:
            raise RuntimeError("this LLM is shut down")

    def _submit_some(
        self, intake: Intake[_Prepared], mine: dict[str, RequestLog], *, raise_errors: bool
    ) -> Generator[RequestOutput, None, None]:
        """Lets requests in that are prepared, while fewer than two rounds of slots, and not too many bytes of images,
        are in the engine; yields the failed. Waits for one where nothing of this run is in the engine."""
        limit = 2 * self._max_num_seqs
        end = time.monotonic() + max(_MIN_INTAKE_S, _INTAKE_SHARE * self._step_s) if mine else math.inf
        for _ in range(_MAX_DRAWN):
            if len(mine) >= limit or (mine and self._core.staged_bytes > _MAX_STAGED_BYTES):
                return
            self._check_alive()
            intake.draw(min(_MAX_DRAWN, limit - len(mine)), waits=not mine)
            drawn = intake.take(wait=not mine)
            if drawn is None:
                return
            try:
                log = self._submit(drawn)
            except ValueError as error:
                if raise_errors:
                    raise
                _log.warning("request %s failed: %s", drawn.request_id, error)
                yield _failed(drawn.request_id, drawn.job.inputs, str(error))
            else:
                mine.update(dict.fromkeys(log.request_ids, log))
            if time.monotonic() > end:
                return

    def _submit(self, drawn: Drawn[_Prepared]) -> RequestLog:
        """Hands a request to the engine. Raises `ValueError` for one that cannot be served."""
        try:
            processed, log = drawn.prepared()
        finally:
            self._check_alive()  # another thread may have shut this LLM down meanwhile
        if log.processors_name:
            self._core.set_processors(log.processors_name, log.processors)
        for index, request in enumerate(processed.requests):
            try:
                with self._ending_with_ranks(ValueError):
                    self._core.add(request)
            except ValueError:
                for added in processed.requests[:index]:
                    self._core.abort(added.request_id)
                self._forget_processors(log)
                raise
        return log

    def _prepare(
        self, request_id: str, job: Job, *, helpers: Executor | None = None, only_end: bool = False
    ) -> _Prepared:
        """For any thread. Raises `ValueError` alone: what else a library raises on a request's data goes to the log."""
        try:
            processed = self._front.processor.process(
                request_id, job.inputs, job.params, priority=job.priority, helpers=helpers
            )
            return processed, RequestLog(
                processed,
                job.params,
                tokenizer=self._front.tokenizer,
                eos_token_ids=self._front.spec.eos_token_ids,
                only_end=only_end,
            )
        except (ValueError, ExecutorError):
            raise
        except Exception as error:
            _log.exception("request %s could not be prepared", request_id)
            raise ValueError(f"the request could not be prepared ({type(error).__name__})") from error

    def _forget_processors(self, log: RequestLog) -> None:
        if log.processors_name and self._dead is None and self._ending.alive:
            self._core.set_processors(log.processors_name, None)


def _failed(request_id: str, inputs: Any, error: str) -> RequestOutput:
    """The output of a request that was refused before it began."""
    prompt = inputs if isinstance(inputs, str) else inputs.get("prompt") if isinstance(inputs, dict) else None
    answer = CompletionOutput(index=0, text="", token_ids=[], finish_reason="error", stop_reason=error)
    return RequestOutput(request_id, prompt, [], [answer], finished=True, error=error)
