"""Requests about pictures that no other request has, and a client that streams their answers."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from PIL import Image
from server_process import ROOT, end_with_parent

sys.path.insert(0, str(ROOT))

from dist_vlm.engine.niceness import run_behind
from examples.demo import questions
from examples.demo.shapes import sample_scene

_FORK = multiprocessing.get_context("fork")
_JPEG_QUALITY = 90
GET_HEALTH = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Question:
    """body: the HTTP request, whole. answer: what the picture shows, as the demo checkpoint was taught to say it."""

    name: str
    body: bytes
    answer: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """problem: why there is no whole answer. first_s, total_s: from the request's first byte sent to the first token
    received, and to the end. news: when each part of the answer was received, of `time.perf_counter()`."""

    name: str
    problem: str | None = None
    text: str = ""
    num_tokens: int = 0
    first_s: float = math.nan
    total_s: float = math.nan
    news: tuple[float, ...] = ()


def make_question(name: str, *, size: tuple[int, int], kind: str, noise: float, max_tokens: int) -> Question:
    """name: seed of the picture and its question. size: width and height in pixels. kind: jpeg or png.
    noise: deviation of each colour of a pixel."""
    rng = random.Random(name)
    asked = None
    while asked is None:
        scene = sample_scene(rng)
        asked = questions.ask(scene, rng.choice(tuple(questions.KINDS)), rng)
    pixels = np.asarray(scene.draw(*size), np.float32)
    pixels = pixels + np.random.default_rng(rng.getrandbits(64)).normal(0, noise, pixels.shape).astype(np.float32)
    file = io.BytesIO()
    picture = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    picture.save(file, kind, **({"quality": _JPEG_QUALITY} if kind == "jpeg" else {}))
    url = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": asked.question}]
    fields = {
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return Question(name, _post("/v1/chat/completions", json.dumps(fields).encode()), asked.answer)


class Client:
    """One connection to the server, opened anew after a failure."""

    def __init__(self, port: int, *, timeout_s: float) -> None:
        self._port = port
        self._timeout_s = timeout_s
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, question: Question) -> Outcome:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                status, parts = await self.exchange(question.body)
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:  # a TimeoutError is an OSError
            await self.close()
            return Outcome(question.name, f"{type(error).__name__}: {error}")
        total_s = time.perf_counter() - began
        if status != 200:
            text = b"".join(part for _, part in parts).decode(errors="replace")
            return Outcome(question.name, f"status {status}: {text[:300]}")
        return _outcome(question.name, parts, began=began, total_s=total_s)

    async def close(self) -> None:
        if self._streams is not None:
            _, writer = self._streams
            self._streams = None
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def exchange(self, body: bytes) -> tuple[int, list[tuple[float, bytes]]]:
        """body: the HTTP request, whole. The status, and each part of the answer with the time when it had come."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(body)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(head.split()[1])
        lines = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        if "content-length" in lines:
            data = await reader.readexactly(int(lines["content-length"]))
            return status, [(time.perf_counter(), data)]
        parts = []
        while size := int(await reader.readline(), 16):
            data = await reader.readexactly(size)
            parts.append((time.perf_counter(), data))
            await reader.readexactly(2)
        await reader.readline()
        return status, parts


async def ask_all(port: int, turns: Sequence[Sequence[Question]], *, timeout_s: float) -> list[Outcome]:
    """turns: what each of several clients asks, one after the other."""

    async def one_client(questions: Sequence[Question]) -> list[Outcome]:
        client = Client(port, timeout_s=timeout_s)
        try:
            return [await client.ask(question) for question in questions]
        finally:
            await client.close()

    return [outcome for outcomes in await asyncio.gather(*map(one_client, turns)) for outcome in outcomes]


class Fork:
    """`work(connection, *arguments)` in a process of its own: a copy of this one, so the arguments cost nothing.

    connection: what `tell` says comes out there. niceness: with how much it gives way to the server's processes.
    """

    def __init__(self, work: Callable[..., Any], *arguments: Any, niceness: int = 0) -> None:
        self._connection, theirs = _FORK.Pipe()
        self._process = _FORK.Process(target=_run_fork, args=(theirs, niceness, work, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def tell(self) -> None:
        self._connection.send(None)

    def result(self, timeout_s: float) -> Any:
        """What the work returned. Raises `RuntimeError` if it failed or takes longer."""
        try:
            if not self._connection.poll(timeout_s):
                raise RuntimeError(f"not done in {timeout_s:g} s")
            value, problem = self._connection.recv()
        except EOFError:
            raise RuntimeError("the process ended without a result") from None
        finally:
            self._process.kill()
            self._process.join()
        if problem is not None:
            raise RuntimeError(problem)
        return value


def percentiles_ms(seconds: Sequence[float]) -> dict[str, Any]:
    """Nearest rank."""
    ordered = sorted(seconds)
    if not ordered:
        return {"count": 0}
    ranks = {f"p{percent}_ms": ordered[math.ceil(percent / 100 * len(ordered)) - 1] for percent in (50, 90, 99)}
    ranks["max_ms"] = ordered[-1]
    return {"count": len(ordered)} | {name: round(1e3 * value, 3) for name, value in ranks.items()}


def _outcome(name: str, parts: list[tuple[float, bytes]], *, began: float, total_s: float) -> Outcome:
    events = b"".join(part for _, part in parts).decode().split("\n\n")
    texts, num_tokens = [], 0
    for line in events:
        if line in ("", "data: [DONE]"):
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            return Outcome(name, f"error in the stream: {json.dumps(event['error'])[:300]}")
        texts += [choice["delta"].get("content", "") for choice in event["choices"]]
        num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
    if "data: [DONE]" not in events[-2:]:
        return Outcome(name, "the stream ended before its end")
    news = tuple(when for when, part in parts if b'"role"' not in part) or (parts[-1][0],)
    return Outcome(name, None, "".join(texts), num_tokens, news[0] - began, total_s, news)


def _post(path: str, body: bytes) -> bytes:
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join([*lines, "", ""]).encode() + body


def _run_fork(connection: Connection, niceness: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    if niceness:
        os.setsid()
        run_behind(niceness)
    try:
        outcome = work(connection, *arguments), None
    except Exception:
        outcome = None, traceback.format_exc()
    connection.send(outcome)
