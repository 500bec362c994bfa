"""A server with a key, a small queue and other limits of its own; and what is left of it at its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest

from dist_vlm.async_llm import AsyncLLM
from dist_vlm.config import EngineConfig
from dist_vlm.config_server import ServerConfig
from dist_vlm.executor.fake import FakeExecutor

from .live import Live, serving

HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 30, "temperature": 0, "ignore_eos": True}
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def closed(server_engine: EngineConfig, server_config: ServerConfig) -> Iterator[Live]:
    """Behind a key and a prefix, with one sequence in work and one in the queue. A step takes 20 ms."""
    engine = server_engine.replace(max_num_seqs=1)
    executor = FakeExecutor(block_size=8, max_model_len=512, max_num_seqs=1, step_delay_s=0.02)
    config = replace(server_config, api_key="secret", max_queued_requests=1, root_path="/proxy", disable_page=True)
    llm = AsyncLLM.from_config(engine, executor=executor)
    try:
        with serving(llm, config) as live:
            yield live
    finally:
        llm.shutdown()


def test_the_key_is_asked_for_everywhere_but_at_health(closed: Live) -> None:
    for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nothing", "/"):
        answer = httpx.get(closed.url + path)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key", path
        assert httpx.get(closed.url + path, headers=KEY).status_code in (200, 404), path
    assert httpx.get(f"{closed.url}/health").status_code == 200
    assert httpx.get(f"{closed.url}/", headers=KEY).status_code == 404
    assert httpx.post(f"{closed.url}/v1/chat/completions", json=HELLO).status_code == 401


def test_more_than_the_queue_holds_is_told_to_come_back(closed: Live) -> None:
    def post(_: int) -> httpx.Response:
        return httpx.post(f"{closed.url}/v1/chat/completions", json=HELLO, headers=KEY, timeout=30)

    with ThreadPoolExecutor(5) as threads:
        answers = list(threads.map(post, range(5)))
    taken = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(taken) == 2 and len(refused) == 3
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in taken}) == 1
    for answer in refused:
        assert answer.json()["error"]["code"] == "queue_full" and int(answer.headers["retry-after"]) >= 1
    many = httpx.post(f"{closed.url}/v1/chat/completions", json={**HELLO, "n": 3, "temperature": 1}, headers=KEY)
    assert many.status_code == 400 and "at most 2" in many.json()["error"]["message"]
    assert closed.services.admission.num_taken == 0


def test_a_rank_that_falls_silent_is_seen_and_heard_again(
    server_engine: EngineConfig, server_config: ServerConfig
) -> None:
    executor = FakeExecutor(block_size=8, max_model_len=512, max_num_seqs=8)
    llm = AsyncLLM.from_config(server_engine, executor=executor)
    threads = set(threading.enumerate())
    try:
        # Silent for long at once: a short limit would take a busy machine for a silent rank.
        with serving(llm, replace(server_config, health_timeout_s=2)) as live:
            wait_for(live, 200)
            executor.silent_since[0] = time.monotonic() - 60
            assert "rank 0" in wait_for(live, 503).text
            executor.silent_since.clear()
            wait_for(live, 200)
    finally:
        llm.shutdown()
    assert not [one for one in threading.enumerate() if one not in threads and one.name.startswith("render")]


def wait_for(live: Live, status: int) -> httpx.Response:
    end = time.monotonic() + 30
    while (answer := httpx.get(f"{live.url}/health")).status_code != status:
        assert time.monotonic() < end, answer.text
        time.sleep(0.02)
    return answer
