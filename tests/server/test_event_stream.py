"""Streams end with their clients: whatever they wait for then, their source is closed, and what they held is free."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import pytest
from starlette.types import Message

from dist_vlm.server.event_stream import DONE, ClientGoneError, EventStream, event, unless_gone

from .asgi import Client, http_scope


def run(work: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(5):
            await work
        assert asyncio.all_tasks() == {asyncio.current_task()}, "nothing is left running"

    asyncio.run(limited())


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Source:
    """Events of a request, and what became of it.

    waits_after: events after which no more come. fails_after: after which it raises.
    """

    def __init__(self, count: int, *, waits: bool = False, error: Exception | None = None) -> None:
        self.count, self.waits, self.error = count, waits, error
        self.num_asked = 0
        self.log: list[str] = []
        self.resources = AsyncExitStack()
        self.resources.callback(self.log.append, "freed")

    async def events(self) -> AsyncGenerator[bytes, None]:
        try:
            for number in range(self.count):
                self.num_asked += 1
                yield event({"number": number})
            if self.waits:
                await asyncio.Event().wait()
            if self.error is not None:
                raise self.error
            yield DONE
        finally:
            self.log.append("closing")
            await asyncio.sleep(0)  # to abort a request takes a moment
            self.log.append("closed")

    def stream(self) -> EventStream:
        return EventStream(self.events(), self.resources)


ENDED = ["closing", "closed", "freed"]


class StuckClient(Client):
    """Takes so many messages, and then neither takes another nor leaves."""

    def __init__(self, num_taken: int) -> None:
        super().__init__()
        self._num_taken = num_taken

    async def send(self, message: Message) -> None:
        if len(self.sent) >= self._num_taken:
            await asyncio.Event().wait()
        await super().send(message)


def serve(source: Source, client: Client) -> asyncio.Task[None]:
    return asyncio.create_task(source.stream()(http_scope(), client.receive, client.send))


def test_an_event_is_one_line_of_json_and_an_empty_one() -> None:
    data = event({"text": "é \n\r\u2028 data: x", "n": [1, None]})
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    assert data.count(b"\n") == 2
    assert b"\r" not in data
    assert json.loads(data[6:]) == {"text": "é \n\r\u2028 data: x", "n": [1, None]}


def test_a_stream_sends_its_events_as_they_are_and_ends() -> None:
    async def main() -> None:
        source, client = Source(2), Client()
        await serve(source, client)
        assert client.status == 200
        assert client.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert client.headers["cache-control"] == "no-cache"
        assert client.headers["x-accel-buffering"] == "no", "a proxy must not hold events back"
        assert "content-length" not in client.headers
        assert client.body == b'data: {"number":0}\n\ndata: {"number":1}\n\ndata: [DONE]\n\n'
        assert [message.get("more_body") for message in client.sent[1:]] == [True, True, True, False]
        assert source.log == ENDED

    run(main())


def test_each_event_is_sent_when_it_comes() -> None:
    async def main() -> None:
        source, client = Source(2, waits=True), Client()
        serving = serve(source, client)
        await settle()
        assert client.body.count(b"data:") == 2
        assert not serving.done()
        client.leave()
        await serving

    run(main())


def test_a_client_that_leaves_while_nothing_comes_ends_its_source() -> None:
    async def main() -> None:
        source, client = Source(2, waits=True), Client()
        serving = serve(source, client)
        await settle()
        client.leave()
        await serving
        assert source.log == ENDED
        assert client.sent[-1]["more_body"] is True, "nothing is sent to nobody"

    run(main())


@pytest.mark.parametrize("num_taken", [1, 2, 3])
def test_a_client_that_leaves_while_it_takes_nothing_ends_its_source(num_taken: int) -> None:
    async def main() -> None:
        source, client = Source(100), StuckClient(num_taken)
        serving = serve(source, client)
        await settle()
        assert source.num_asked == num_taken, "nothing is made ahead of what is taken"
        client.leave()
        await serving
        assert source.log == ENDED

    run(main())


def test_a_client_that_neither_takes_nor_leaves_counts_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_vlm.server.event_stream._STALLED_S", 0.05)

    async def main() -> None:
        source, client = Source(9), StuckClient(2)
        await serve(source, client)
        assert len(client.sent) == 2
        assert source.log == ENDED

    run(main())


def test_a_client_that_leaves_before_the_first_byte_still_ends_its_source() -> None:
    """The source has not begun, so nothing of it runs; it must not begin later."""

    async def main() -> None:
        source, client = Source(100), StuckClient(0)
        events = source.events()
        stream = EventStream(events, source.resources)
        serving = asyncio.create_task(stream(http_scope(), client.receive, client.send))
        await settle()
        client.leave()
        await serving
        assert source.log == ["freed"]
        with pytest.raises(StopAsyncIteration):
            await anext(events)
        assert source.num_asked == 0

    run(main())


def test_a_client_that_had_left_already_ends_its_source() -> None:
    async def main() -> None:
        source, client = Source(1, waits=True), Client()
        client.leave()
        await serve(source, client)
        assert source.log in (ENDED, ["freed"])

    run(main())


def test_a_server_that_gives_up_ends_the_source() -> None:
    async def main() -> None:
        for source, client in ((Source(1, waits=True), Client()), (Source(9), StuckClient(2))):
            serving = serve(source, client)
            await settle()
            serving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await serving
            assert source.log == ENDED

    run(main())


def test_an_error_of_the_source_comes_out_after_everything_is_free() -> None:
    async def main() -> None:
        source, client = Source(1, error=KeyError("x")), Client()
        with pytest.raises(KeyError):
            await serve(source, client)
        assert source.log == ENDED
        assert client.sent[-1]["more_body"] is True, "a client can tell that it is not the end"

    run(main())


def test_an_error_of_sending_ends_the_source() -> None:
    class BrokenClient(Client):
        async def send(self, message: Message) -> None:
            if len(self.sent) == 2:
                raise OSError
            await super().send(message)

    async def main() -> None:
        source, client = Source(9), BrokenClient()
        with pytest.raises(OSError):  # noqa: PT011
            await serve(source, client)
        assert source.log == ENDED

    run(main())


# --------------------------------------------------------------- unless_gone


class Work:
    def __init__(self) -> None:
        self.log: list[str] = []
        self.finish = asyncio.Event()

    async def run(self) -> int:
        self.log.append("began")
        try:
            await self.finish.wait()
        finally:
            await asyncio.sleep(0)
            self.log.append("ended")
        return 5


def test_work_whose_client_waits_gives_its_result() -> None:
    async def main() -> None:
        work, client = Work(), Client()
        waiting = asyncio.create_task(unless_gone(client.request(), work.run()))
        await settle()
        assert not waiting.done()
        work.finish.set()
        assert await waiting == 5

    run(main())


def test_work_whose_client_leaves_is_cancelled_and_waited_for() -> None:
    async def main() -> None:
        work, client = Work(), Client()
        waiting = asyncio.create_task(unless_gone(client.request(), work.run()))
        await settle()
        client.leave()
        with pytest.raises(ClientGoneError):
            await waiting
        assert work.log == ["began", "ended"]

    run(main())


def test_work_that_is_done_when_its_client_leaves_counts() -> None:
    """What it returned may have to be closed: it must not get lost."""

    async def main() -> None:
        work, client = Work(), Client()
        waiting = asyncio.create_task(unless_gone(client.request(), work.run()))
        await settle()
        work.finish.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        client.leave()
        assert await waiting == 5

    run(main())


def test_an_error_of_the_work_is_raised() -> None:
    async def fail() -> None:
        raise KeyError("x")

    async def main() -> None:
        with pytest.raises(KeyError):
            await unless_gone(Client().request(), fail())

    run(main())


def test_work_is_cancelled_with_whoever_waits_for_it() -> None:
    async def main() -> None:
        work = Work()
        waiting = asyncio.create_task(unless_gone(Client().request(), work.run()))
        await settle()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert work.log == ["began", "ended"]

    run(main())
