"""One end of a connection, played by a test: what an ASGI application is sent, and what it sends."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Any

from starlette.requests import Request
from starlette.types import Message, Scope

Header = tuple[str, str]
JSON = ("content-type", "application/json")


def http_scope(path: str = "/", *, method: str = "POST", headers: Iterable[Header] = (), **more: Any) -> Scope:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    return {"type": "http", "method": method, "path": path, "query_string": b"", "headers": raw, **more}


class Client:
    """Sends what it is given, then nothing until it leaves.

    pause_s: before each message. sent: what the application sent.
    """

    def __init__(self, *messages: Message, pause_s: float = 0.0) -> None:
        self.unread = deque(messages)
        self.sent: list[Message] = []
        self._pause_s = pause_s
        self._left = asyncio.Event()

    def leave(self) -> None:
        self._left.set()

    async def receive(self) -> Message:
        if self.unread:
            await asyncio.sleep(self._pause_s)
            return self.unread.popleft()
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    def request(self, *headers: Header) -> Request:
        return Request(http_scope(headers=headers), self.receive)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode("latin-1") for name, value in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])


def part(body: bytes, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def parts(*bodies: bytes) -> list[Message]:
    """A body in several."""
    return [part(body, more=index < len(bodies) - 1) for index, body in enumerate(bodies)]
