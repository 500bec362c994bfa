"""Server-sent events, and work that ends when its client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

Result = TypeVar("Result")

# A client that reads nothing for so long, and so takes no more events, counts as gone.
_STALLED_S = 60.0

DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client closed its connection: nobody reads an answer."""


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Sends events as they come, and closes their source when the client leaves.

    events: closed in any case, before `resources` are. One that had not begun then begins no more.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], resources: AsyncExitStack) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._events = events
        self._resources = resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._resources, aclosing(self._events):
            sending = asyncio.create_task(self._send(send))
            try:
                with suppress(ClientGoneError):  # the status is sent: there is no other answer
                    await _first(sending, receive)
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for one in self._events:
            try:
                async with asyncio.timeout(_STALLED_S):
                    await send({"type": "http.response.body", "body": one, "more_body": True})
            except TimeoutError:
                raise ClientGoneError from None
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result of some work, which is cancelled if the client leaves before. The body must have been read.
    Raises `ClientGoneError` then."""
    task = asyncio.ensure_future(work)
    try:
        return await _first(task, request.receive)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _first(task: asyncio.Future[Result], receive: Receive) -> Result:
    """Waits for the task, or for the client to leave."""
    leaving = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
