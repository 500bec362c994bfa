"""One replica: a tensor-parallel group and its engine core, as an actor that Ray Serve keeps.

The front stays with the server: what comes in is a checked `EngineRequest`, what goes out is its `EngineOutput`s, both
as `engine/core_messages.py` writes them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import logging
import os
from collections.abc import AsyncGenerator
from typing import Any

from dist_vlm.config import EngineConfig
from dist_vlm.engine import core_messages as messages
from dist_vlm.engine.core_loop import CoreLoop
from dist_vlm.engine.make_core import make_core
from dist_vlm.engine.messages import EngineOutput
from dist_vlm.executor.base import ExecutorError
from dist_vlm.launch import replica_report
from dist_vlm.launch.replica_lifeline import Lifeline
from dist_vlm.workers.wire import WireError

# What a part of a stream costs the processes that it passes. With many streams each waits so much longer for its next
# part, which then holds several steps' tokens, so that all together never take more than about a core.
_PART_S = 0.00025

_log = logging.getLogger(__name__)


class EngineReplica:
    """Made by Serve in the placement group of `executor.placement.engine_bundles`, in which its ranks are started too.

    fields: a resolved configuration's flat fields, as JSON. lifeline: what ends the replica with its server.
    Raises what the start of an engine raises; Serve shows it as the cause of a failed deployment.
    """

    def __init__(self, fields: str, lifeline: Lifeline | None = None) -> None:
        self._config = EngineConfig.from_fields(**json.loads(fields))
        self._ids = map(str, itertools.count())
        self._streams: dict[str, _Stream] = {}
        self._events: asyncio.AbstractEventLoop | None = None
        self._core = CoreLoop(make_core(self._config))
        self._info = self._core.start(self._take)
        self._core.ended().add_done_callback(lambda ended: self._leave(ended.result()))
        if lifeline is not None:
            lifeline.watch()

    async def info(self) -> bytes:
        """A `Started`."""
        return messages.pack(messages.Started(self._info))

    async def generate(self, frame: bytes, claim: Any = None) -> AsyncGenerator[bytes, None]:
        """The outputs of a request, an `Outputs` each time there are new ones; closing it aborts the request.

        frame: an `Add`. claim: for the router alone. Raises `RuntimeError` if the engine ends before the request.
        """
        message = messages.unpack(frame)
        if not isinstance(message, messages.Add):
            raise WireError(f"{type(message).__name__} in place of Add")
        self._events = asyncio.get_running_loop()
        # Its own number: the server may have sent the same request before, over a connection that broke.
        request = dataclasses.replace(messages.request_of(message), request_id=next(self._ids))
        stream = self._streams[request.request_id] = _Stream()
        try:
            self._core.add(request)
            while not stream.is_over:
                outputs = await stream.next()
                if stream.is_over and self._core.ended().done():
                    # What it says then is its own end, not the request's.
                    raise RuntimeError("the replica's engine has ended")
                told = tuple(
                    messages.output_message(output._replace(request_id=message.request_id)) for output in outputs
                )
                yield messages.pack(messages.Outputs(told))
                if not stream.is_over:
                    await asyncio.sleep(_PART_S * (len(self._streams) - 1))
        finally:
            del self._streams[request.request_id]
            if not stream.is_over:
                self._core.abort(request.request_id)

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        silence = await asyncio.wrap_future(self._core.silence())
        limit = self._config.scaling.replica_health_timeout_s
        for rank, silent_s in enumerate(silence):
            if silent_s > limit:
                raise RuntimeError(
                    f"rank {rank} finished no step and answered no ping for {silent_s:.1f} s; "
                    f"replica_health_timeout_s = {limit:g}"
                )

    async def record_routing_stats(self) -> dict[str, Any]:
        """Called by Serve again and again, and passed on to the routers: see `replica_report.py`."""
        state, silence = await asyncio.gather(
            asyncio.wrap_future(self._core.state()), asyncio.wrap_future(self._core.silence())
        )
        return replica_report.written(state, silence)

    def __del__(self) -> None:
        core = getattr(self, "_core", None)
        if core is not None:
            core.shutdown()

    # ------------------------------------------------------- the core's thread

    def _take(self, outputs: list[EngineOutput]) -> None:
        if outputs and self._events is not None:
            self._events.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: list[EngineOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put(output)

    def _leave(self, dead: ExecutorError | None) -> None:
        """The engine cannot go on: the process ends at once, which breaks its streams, so that they go on elsewhere."""
        if dead is not None:
            _log.error("the replica ends, its engine has: %s", dead)
            logging.shutdown()
            os._exit(1)


class _Stream:
    """A request's outputs on their way. In the event loop alone."""

    def __init__(self) -> None:
        self.is_over = False
        self._outputs: list[EngineOutput] = []
        self._came = asyncio.Event()

    def put(self, output: EngineOutput) -> None:
        self._outputs.append(output)
        self._came.set()

    async def next(self) -> list[EngineOutput]:
        """All that have come since the last time, at least one."""
        await self._came.wait()
        self._came.clear()
        outputs, self._outputs = self._outputs, []
        self.is_over = outputs[-1].finish_reason is not None
        return outputs
