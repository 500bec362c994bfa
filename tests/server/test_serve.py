"""The server as a program: its start, its health, its end."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

ROOT = Path(__file__).resolve().parents[2]
HEALTH_TIMEOUT_S = 2.0
# What a check adds: the pings' interval, the monitor's, and a machine whose cores are taken.
SLACK_S = 3.0
NUM_RUNNING, NUM_STREAMS = 3, 5
ENDLESS = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 60, "temperature": 0, "ignore_eos": True}


SERVE = ["dist_vlm.launch.cli", "serve", "--config", str(ROOT / "configs" / "demo.yaml")]
# The seed's own command, with the numbers of the shipped checkpoint.
SEED = [
    "dist_vlm.entrypoints.openai.api_server", "--model", str(ROOT / "examples" / "demo" / "checkpoint"),
    "--image-input-type", "pixel_values", "--image-token-id", "493", "--image-input-shape", "1,3,72,72",
    "--image-feature-size", "81", "--chat-template", str(ROOT / "examples" / "template_llava.jinja"),
]  # fmt: skip


@contextmanager
def server(program: list[str], *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server's command, ready; its process and address. Ended in any case."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", *program, "--port", str(port), *arguments]
    process = subprocess.Popen(command, cwd="/", env=os.environ | {"PYTHONPATH": str(ROOT)})
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 90
        while status(url, "/ready") != 200:
            assert process.poll() is None and time.monotonic() < end, "it did not start"
            time.sleep(0.1)
        yield process, url
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def status(url: str, path: str) -> int | None:
    try:
        return httpx.get(url + path, timeout=2).status_code
    except httpx.TransportError:
        return None


def until_health(url: str, wanted: int) -> float:
    """Seconds until the health is as wanted."""
    began = time.monotonic()
    while status(url, "/health") != wanted:
        assert time.monotonic() - began < HEALTH_TIMEOUT_S + SLACK_S + 5, f"it did not become {wanted}"
        time.sleep(0.05)
    return time.monotonic() - began


def descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            yield child
            yield from descendants(child)


def name_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def the_seeds_client(url: str, **more: Any) -> str | None:
    """The client of the seed's page, its model and its picture apart."""
    picture = base64.b64encode((ROOT / "examples" / "demo" / "pictures" / "digit.png").read_bytes()).decode()
    client = OpenAI(api_key="EMPTY", base_url=f"{url}/v1")
    chat_response = client.chat.completions.create(
        model=str(ROOT / "examples" / "demo" / "checkpoint"),
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What digit is this?"},
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
                ],
            }
        ],
        **more,
    )
    return chat_response.choices[0].message.content


async def a_stream(client: httpx.AsyncClient, url: str, begun: asyncio.Event) -> tuple[int, str, bool]:
    """Its status, its text, and whether it came to its end."""
    async with client.stream("POST", f"{url}/v1/chat/completions", json={**ENDLESS, "stream": True}) as answer:
        lines = []
        async for line in answer.aiter_lines():
            begun.set()
            lines.append(line)
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    return answer.status_code, text, "data: [DONE]" in lines


async def terminate_under_load(process: subprocess.Popen[bytes], url: str) -> tuple[list[Any], httpx.Response, int]:
    async with httpx.AsyncClient(timeout=60) as client:
        begun = [asyncio.Event() for _ in range(NUM_STREAMS)]
        streams = [asyncio.create_task(a_stream(client, url, one)) for one in begun]
        # As many as run at once; the others wait for their turn.
        await asyncio.gather(*(one.wait() for one in begun[:NUM_RUNNING]))
        process.send_signal(signal.SIGTERM)
        while (ready := await client.get(f"{url}/ready")).status_code == 200:
            await asyncio.sleep(0.01)
        newcomer = await client.post(f"{url}/v1/chat/completions", json=ENDLESS)
        health = await client.get(f"{url}/health")
        assert "shutting down" in ready.json()["error"]["message"] and health.status_code == 200
        return await asyncio.gather(*streams), newcomer, process.wait(30)


@pytest.mark.timeout(180)
def test_a_stopped_rank_turns_the_health_and_a_term_cuts_nobody_off() -> None:
    with server(SERVE, "--health-timeout-s", str(HEALTH_TIMEOUT_S), "--max-num-seqs", str(NUM_RUNNING)) as (
        process,
        url,
    ):
        ranks = [pid for pid in descendants(process.pid) if b"ray::Worker" in name_of(pid)]
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGSTOP)
        try:
            assert until_health(url, 503) <= HEALTH_TIMEOUT_S + SLACK_S
            assert "answered no ping" in httpx.get(f"{url}/health").json()["error"]["message"]
        finally:
            os.kill(ranks[1], signal.SIGCONT)
        assert until_health(url, 200) <= SLACK_S
        streams, newcomer, code = asyncio.run(terminate_under_load(process, url))
    assert [(code, done) for code, _, done in streams] == [(200, True)] * NUM_STREAMS
    (text,) = {text for _, text, _ in streams}
    assert text
    assert newcomer.status_code == 503 and newcomer.json()["error"]["code"] == "shutting_down"
    assert int(newcomer.headers["retry-after"]) >= 1
    assert code == 0


@pytest.mark.timeout(180)
def test_an_engine_that_is_stopped_or_killed_is_noticed_and_ends_the_server() -> None:
    arguments = [
        "--executor",
        "inline",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--health-timeout-s",
        str(HEALTH_TIMEOUT_S),
    ]
    with server(SEED, *arguments) as (process, url):
        assert the_seeds_client(url)
        assert (the_seeds_client(url, temperature=0) or "").strip() == "8"
        (engine,) = (pid for pid in descendants(process.pid) if b"core_process" in name_of(pid))
        os.kill(engine, signal.SIGSTOP)
        try:
            assert until_health(url, 503) <= HEALTH_TIMEOUT_S + SLACK_S
        finally:
            os.kill(engine, signal.SIGCONT)
        assert until_health(url, 200) <= SLACK_S
        os.kill(engine, signal.SIGKILL)
        assert process.wait(30) == 1
    assert not [pid for pid in (engine, process.pid) if name_of(pid)]


def test_a_port_that_is_taken_is_told_in_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", *SERVE, "--port", port]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert f"port = {port}" in line and "in use" in line
