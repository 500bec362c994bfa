from __future__ import annotations

import argparse
import asyncio
import contextlib
import types

import pytest
import server_soak
from server_requests import _outcome


def test_the_longest_stalls_are_those_of_all_clients_together_and_not_before_they_count() -> None:
    # Of two clients, one after the other: between 3 and 7 the first one heard something at 5.
    news = [0.0, 2.9, 3.0, 7.0, 7.5, 5.0, 7.2]
    found = server_soak.longest_stalls(news, since=3.0, count=3)
    assert [(stall["ms"], stall["at_s"]) for stall in found] == [(2000, 2.0), (2000, 0.0), (300, 4.2)]
    (found,) = server_soak.longest_stalls(news, since=0.0, count=1)
    assert (found["ms"], found["at_s"]) == (2900, 0.0)


def test_a_stall_tells_who_else_was_late_in_it() -> None:
    news = [0.0, 1.0, 2.0, 6.0]
    lateness = [(0.5, 0.2), (0.1, 1.95), (0.3, 5.9), (9.0, 6.1)]
    health = [(3.0, 2.5), (4.0, 7.0)]
    stalls = server_soak.longest_stalls(news, since=0.0, lateness=lateness, health=health, count=3)
    told = [(stall["at_s"], stall["clients_late_ms"], stall["health_ms"]) for stall in stalls]
    assert told == [(2.0, 300, 3000), (1.0, 100, 0), (0.0, 500, 0)]


def test_health_is_asked_for_on_when_connections_are_lost() -> None:
    """The server answers twice on each connection, and then closes it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    async def probe() -> server_soak.Soak:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            arguments = argparse.Namespace(requests=0, max_tokens=[1], sizes=[(8, 8)], clients=1, timeout_s=5)
            soak = server_soak.Soak(types.SimpleNamespace(port=port), arguments)
            task = asyncio.create_task(soak._probe())
            async with asyncio.timeout(30):
                while len(soak.health) < 7:
                    await asyncio.sleep(0.02)
            assert not task.done()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return soak

    soak = asyncio.run(probe())
    assert len(soak.lateness) in (7, 8)
    assert all(took < 5 for took, _ in soak.health)


def test_the_growth_of_a_gpu_is_a_slope_without_the_first_requests() -> None:
    samples = [(0, 5), (100, 1000), (200, 1200), (300, 1400)]
    found = server_soak.gpu_growth(samples, skip=100)
    assert (found["bytes_a_request"], found["standard_error"]) == (2.0, 0.0)
    assert found["first_and_last"] == [5, 1400]
    assert server_soak.gpu_growth(samples, skip=200)["bytes_a_request"] is None, "two points say nothing of noise"


@pytest.mark.parametrize(("slopes", "met"), [([], {}), ([0.0, 5.0], True), ([0.0, 2000.0], False), ([None], False)])
def test_gpus_are_judged_where_there_are_any(slopes: list[float | None], met: object) -> None:
    found = server_soak.gpus_met({str(index): {"bytes_a_request": slope} for index, slope in enumerate(slopes)})
    assert found == ({} if met == {} else {"slope of GPU memory under 1024 bytes a request": met})


def test_an_outcome_has_the_moments_of_its_parts() -> None:
    begin = b'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n'
    word = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
    parts = [(1.0, begin), (2.0, word), (2.5, word + b"data: [DONE]\n\n")]
    outcome = _outcome("one", parts, began=0.5, total_s=2.0)
    assert (outcome.problem, outcome.text, outcome.first_s, outcome.news) == (None, "aa", 1.5, (2.0, 2.5))
