"""The requests of an asynchronous front: news come from the core's thread, clients wait in event loops.

A stream keeps the latest output and one wake-up: a slow client gets several steps' news in one, and nothing queues up.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Literal

from dist_vlm.engine.core_client import CoreClient
from dist_vlm.engine.messages import EngineOutput
from dist_vlm.engine.request_log import RequestLog
from dist_vlm.outputs import CompletionOutput, RequestOutput

_log = logging.getLogger(__name__)

_WOKEN_AT_ONCE = 2


class Stream:
    """One request as its client waits for it. `next` is the client's, the rest may be called from any thread.

    request_id: the client's name for it. engine_id: the front's own, never used twice: news of a request that was
        aborted cannot reach another of the same name.
    loop: the client's event loop.
    """

    def __init__(self, request_id: str, engine_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.request_id, self.engine_id, self.loop = request_id, engine_id, loop
        self.is_over = False
        self.event = asyncio.Event()
        self._lock = threading.Lock()
        self._log: RequestLog | None = None
        self._output = RequestOutput(request_id, None, [], [CompletionOutput(0, "", [])], finished=False)
        self._refusal: ValueError | None = None
        self._is_woken = False

    @property
    def processors_name(self) -> str:
        """Under which the core knows the request's logits processors; empty where it has none."""
        return self._log.processors_name if self._log is not None else ""

    @property
    def engine_ids(self) -> tuple[str, ...]:
        """The request's ids in the core, one an answer; none before it was handed over."""
        return self._log.request_ids if self._log is not None else ()

    async def next(self) -> RequestOutput:
        """Waits for news; returns the output as it now is, the caller's own copy. Raises what `refuse` was given."""
        await self.event.wait()
        self.event.clear()
        with self._lock:
            self._is_woken = False
            if self._refusal is not None:
                raise self._refusal
            return _copy(self._output, self.request_id)

    def begin(self, log: RequestLog) -> bool:
        """The request is about to be handed over; false if it has ended meanwhile."""
        with self._lock:
            if self.is_over:
                return False
            self._log, self._output = log, log.output
            return True

    def take(self, news: EngineOutput) -> list[str]:
        """Adds news of one of the request's answers; returns what the core must abort. Does not raise."""
        with self._lock:
            if self.is_over or self._log is None:
                return []
            try:
                self.is_over = self._log.take(news).finished
                return self._log.pop_unwanted()
            except Exception as error:
                _log.exception("request %s: the answer could not be detokenized", self.request_id)
                self._end("error", f"the answer could not be detokenized ({type(error).__name__})")
                return list(self.engine_ids)

    def end(self, reason: Literal["abort", "error"], cause: str | None = None) -> bool:
        """Ends the request here, whatever the core does; false if it has ended already."""
        with self._lock:
            if self.is_over:
                return False
            self._end(reason, cause)
            return True

    def refuse(self, error: ValueError) -> None:
        """Ends the request before it began: its client gets the error raised."""
        with self._lock:
            if not self.is_over:
                self.is_over, self._refusal = True, error

    def must_wake(self) -> bool:
        """Whether the client does not know of any news yet; from now on it does."""
        with self._lock:
            already, self._is_woken = self._is_woken, True
            return not already

    def _end(self, reason: Literal["abort", "error"], cause: str | None) -> None:
        self.is_over = True
        if reason == "error" and self._log is not None:
            self._log.fail(cause or reason)
            return
        output = self._output
        for answer in output.outputs:
            if answer.finish_reason is None:
                answer.finish_reason, answer.stop_reason = reason, cause
        output.finished, output.error = True, cause if reason == "error" else None
        if output.metrics is not None:
            output.metrics.finished_time = time.time()


class StreamTable:
    """All streams that have not ended, and what the core is told of their ends. Safe for use from several threads."""

    def __init__(self, client: CoreClient) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._serials = itertools.count()
        self._numbers = itertools.count()
        self._by_request: dict[str, Stream] = {}
        self._by_engine: dict[str, Stream] = {}
        self._waiters: list[Future[None]] = []

    def __len__(self) -> int:
        return len(self._by_request)

    def open(self, request_id: str | None, loop: asyncio.AbstractEventLoop) -> Stream:
        """A new stream for a client in `loop`. request_id: None takes a number.

        Raises `ValueError` for an id that is in use.
        """
        if request_id is not None and (not isinstance(request_id, str) or not request_id):
            raise ValueError(f"request_id = {request_id!r}: must be a string that is not empty, or None for a number")
        with self._lock:
            if request_id is None:
                request_id = next(str(n) for n in self._numbers if str(n) not in self._by_request)
            if request_id in self._by_request:
                raise ValueError(f"request_id {request_id!r} is in use")
            stream = Stream(request_id, f"{request_id}#{next(self._serials)}", loop)
            self._by_request[request_id] = stream
            return stream

    def find(self, request_id: str) -> Stream | None:
        return self._by_request.get(request_id)

    def begin(self, stream: Stream, log: RequestLog) -> bool:
        """A stream's request is about to be handed over; false if it has ended meanwhile."""
        with self._lock:
            if not stream.begin(log):
                return False
            self._by_engine.update(dict.fromkeys(stream.engine_ids, stream))
            return True

    def take(self, outputs: Iterable[EngineOutput]) -> None:
        """The core's news, for whichever streams they are."""
        touched: dict[int, Stream] = {}
        for news in outputs:
            stream = self._by_engine.get(news.request_id)
            if stream is not None:
                for engine_id in stream.take(news):
                    self._client.abort(engine_id)
                if stream.is_over and stream.processors_name:
                    self._client.set_processors(stream.processors_name, None)
                touched[id(stream)] = stream
        self._told(touched.values())

    def end(self, stream: Stream, reason: Literal["abort", "error"], cause: str | None = None) -> None:
        """Ends a stream, and its request in the core; nothing if it has ended already."""
        if stream.end(reason, cause):
            self.withdraw(stream)
            self._told([stream])

    def withdraw(self, stream: Stream) -> None:
        """Has the core forget a stream's request."""
        for engine_id in stream.engine_ids:
            self._client.abort(engine_id)
        if stream.processors_name:
            self._client.set_processors(stream.processors_name, None)

    def end_all(self, cause: str) -> None:
        """Ends all streams with an error."""
        for stream in list(self._by_request.values()):
            self.end(stream, "error", cause)

    def refuse(self, stream: Stream, error: ValueError) -> None:
        stream.refuse(error)
        self._told([stream])

    def all_ended(self) -> Future[None]:
        """Done once there is no stream that has not ended."""
        waiter: Future[None] = Future()
        with self._lock:
            if self._by_request:
                self._waiters.append(waiter)
            else:
                waiter.set_result(None)
        return waiter

    def _told(self, streams: Iterable[Stream]) -> None:
        """Wakes the clients of streams that have news, once a loop, and forgets the streams that have ended."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Stream]] = {}
        for stream in streams:
            if stream.is_over:
                self._forget(stream)
            if stream.must_wake() or stream.loop.is_closed():
                by_loop.setdefault(stream.loop, []).append(stream)
        for loop, woken in by_loop.items():
            try:
                loop.call_soon_threadsafe(_wake, loop, woken)
            except RuntimeError:  # the loop is closed, and its clients are gone with it
                for stream in woken:
                    self._drop(stream)

    def _drop(self, stream: Stream) -> None:
        if stream.end("abort"):
            self.withdraw(stream)
            self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        with self._lock:
            if self._by_request.get(stream.request_id) is not stream:
                return
            del self._by_request[stream.request_id]
            for engine_id in stream.engine_ids:
                self._by_engine.pop(engine_id, None)
            waiters = [] if self._by_request else self._waiters
            if waiters:
                self._waiters = []
        for waiter in waiters:
            with suppress(InvalidStateError):  # whoever waited may have given up
                waiter.set_result(None)


def _wake(loop: asyncio.AbstractEventLoop, streams: list[Stream]) -> None:
    """A few at a time: a step has news for many clients at once, and between them the loop looks at what else there
    is to do."""
    for stream in streams[:_WOKEN_AT_ONCE]:
        stream.event.set()
    if len(streams) > _WOKEN_AT_ONCE:
        loop.call_soon(_wake, loop, streams[_WOKEN_AT_ONCE:])


def _copy(output: RequestOutput, request_id: str) -> RequestOutput:
    """The output as it is now. The prompt's tokens, which do not change, are shared."""
    answers = [
        dataclasses.replace(
            answer,
            token_ids=list(answer.token_ids),
            logprobs=None if answer.logprobs is None else list(answer.logprobs),
        )
        for answer in output.outputs
    ]
    return dataclasses.replace(
        output,
        request_id=request_id,
        outputs=answers,
        prompt_logprobs=None if output.prompt_logprobs is None else list(output.prompt_logprobs),
        metrics=None if output.metrics is None else dataclasses.replace(output.metrics),
    )
