"""Streams alone: news from one thread, clients in loops, each news seen and each end seen once."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from dist_vlm.engine.core_client import CoreClient
from dist_vlm.engine.front import Front
from dist_vlm.engine.messages import EngineOutput
from dist_vlm.engine.request_log import RequestLog
from dist_vlm.engine.streams import Stream, StreamTable
from dist_vlm.outputs import RequestOutput
from dist_vlm.sampling import SamplingParams


class Client(CoreClient):
    """A core that does nothing and keeps what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.aborted: list[str] = []
        self.forgotten: list[str] = []

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def set_processors(self, name: str, processors: Any) -> None:
        assert processors is None
        self.forgotten.append(name)

    def shutdown(self) -> None: ...

    def _start(self) -> Any: ...

    def _send_request(self, request: Any) -> None: ...

    def silence(self) -> Any: ...

    def _ask_state(self) -> None: ...


def log_of(front: Front, stream: Stream, **params: Any) -> RequestLog:
    chosen = SamplingParams(max_tokens=10_000, **params)
    processed = front.processor.process(stream.engine_id, "hello", chosen)
    return RequestLog(processed, chosen, tokenizer=front.tokenizer, eos_token_ids=front.spec.eos_token_ids)


async def whole(stream: Stream) -> list[RequestOutput]:
    seen = [await stream.next()]
    while not seen[-1].finished:
        seen.append(await stream.next())
    return seen


def test_no_news_is_lost_between_a_fast_core_and_a_client_that_sleeps(front: Front) -> None:
    """The client takes its news at every moment relative to the core's: it must see the last one, and never less."""
    table = StreamTable(Client())

    async def run(count: int) -> list[RequestOutput]:
        stream = table.open(None, asyncio.get_running_loop())
        assert table.begin(stream, log_of(front, stream))

        def core() -> None:
            for i in range(count):
                table.take([EngineOutput(stream.engine_id, (300 + i % 7,))])
            table.take([EngineOutput(stream.engine_id, (5,), finish_reason="length")])

        thread = threading.Thread(target=core)
        thread.start()
        seen = await asyncio.wait_for(whole(stream), 10)
        thread.join()
        return seen

    for count in range(0, 400, 7):
        seen = asyncio.run(run(count))
        lengths = [len(output.outputs[0].token_ids) for output in seen]
        assert lengths == sorted(lengths)
        assert lengths[-1] == count + 1
        assert [output.finished for output in seen] == [False] * (len(seen) - 1) + [True]
    assert len(table) == 0


def test_news_of_an_ended_stream_reach_no_other_of_the_same_name(front: Front) -> None:
    client = Client()
    table = StreamTable(client)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        old = table.open("a", loop)
        table.begin(old, log_of(front, old))
        table.end(old, "abort")
        new = table.open("a", loop)
        table.begin(new, log_of(front, new))
        table.take([EngineOutput(old.engine_id, (7,), finish_reason="abort")])
        assert client.aborted == [old.engine_id]
        table.take([EngineOutput(new.engine_id, (8,), finish_reason="length")])
        (last,) = await whole(new)
        assert (last.request_id, last.outputs[0].token_ids, last.outputs[0].finish_reason) == ("a", [8], "length")
        (ended,) = await whole(old)
        assert (ended.outputs[0].token_ids, ended.outputs[0].finish_reason) == ([], "abort")

    asyncio.run(run())


def test_the_core_forgets_the_logits_processors_of_a_stream_that_ends(front: Front) -> None:
    client = Client()
    table = StreamTable(client)

    async def run() -> None:
        streams = [table.open(None, asyncio.get_running_loop()) for _ in range(3)]
        for stream in streams:
            log = log_of(front, stream)
            log.processors_name = f"of {stream.request_id}"
            table.begin(stream, log)
        table.take([EngineOutput(streams[0].engine_id, (7,))])
        assert client.forgotten == []
        table.take([EngineOutput(streams[0].engine_id, (7,), finish_reason="length")])
        table.end(streams[1], "abort")
        table.end_all("the engine is shut down")
        assert client.forgotten == ["of 0", "of 1", "of 2"]

    asyncio.run(run())


def test_one_that_ends_before_it_began_is_not_begun(front: Front) -> None:
    table = StreamTable(Client())

    async def run() -> None:
        stream = table.open("a", asyncio.get_running_loop())
        table.end(stream, "abort")
        assert not table.begin(stream, log_of(front, stream))
        refused = table.open("b", asyncio.get_running_loop())
        table.refuse(refused, ValueError("no"))
        table.end(refused, "error", "too late")
        with pytest.raises(ValueError, match="no"):
            await refused.next()
        assert not table._by_engine

    asyncio.run(run())


def test_who_waits_for_all_to_end_is_told_once_they_have(front: Front) -> None:
    table = StreamTable(Client())
    assert table.all_ended().done()

    async def run() -> None:
        streams = [table.open(None, asyncio.get_running_loop()) for _ in range(2)]
        waiting, given_up = table.all_ended(), table.all_ended()
        table.end(streams[0], "abort")
        assert not waiting.done()
        given_up.cancel()
        table.end(streams[1], "error", "lost")
        assert waiting.done()

    asyncio.run(run())


def test_clients_of_one_loop_are_woken_together(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    table = StreamTable(Client())

    async def run() -> None:
        loop = asyncio.get_running_loop()
        streams = [table.open(None, loop) for _ in range(50)]
        for stream in streams:
            table.begin(stream, log_of(front, stream))
        calls = []
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *given: (calls.append(given), wake(*given)))
        began = time.monotonic()
        for _ in range(3):  # nobody has looked yet: there is nothing to tell again
            table.take([EngineOutput(stream.engine_id, (7,)) for stream in streams])
        assert len(calls) == 1
        outputs = await asyncio.gather(*(stream.next() for stream in streams))
        assert all(output.outputs[0].token_ids == [7, 7, 7] for output in outputs)
        assert time.monotonic() - began < 5

    asyncio.run(run())
