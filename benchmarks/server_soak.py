"""How the memory of each of a server's processes, and of each GPU, grows with the requests that it has answered, and
the longest time in which no client heard anything. Prints JSON.

Every request is about another picture. The slope is that of a line through the memory over the number of requests
answered (least squares), without the first ones, in which caches and heaps fill. Beside the clients /health is asked
for all the time: a stall in which it was late to be sent is the clients' own, one in which its answer was late is the
server's front, and any other the engine's or its ranks'.

    python benchmarks/server_soak.py
    python benchmarks/server_soak.py --executor ray --ranks 2 --out result.json
    python benchmarks/server_soak.py --config GPU.yaml --model DIR --executor ray --seconds 480 --requests 1000000 \
        --sizes 96x96 336x336 640x480 --max-tokens 4 32 128 --kind jpeg
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from server_process import ServerProcess, add_server_flags, gpu_memory, machine, memory_of, server_flags
from server_requests import GET_HEALTH, Client, Question, make_question, percentiles_ms

NOISE = 4.0
KINDS = ("rss", "pss", "uss")
TARGET_BYTES = 1024
TARGET_STALL_S = 1.0
PROBE_S = 0.05
# The clients' process gives way to the server's.
NICENESS = 10

# What the server holds, by its own account.
HELD = re.compile(
    r"^dist_vlm:(num_requests_in_server|held_bytes|kv_blocks_cached|feature_rows|staged_images|staged_bytes)"
    r"(?:\{what=\"(\w+)\"\}|\{.*\})? (\S+)$",
    flags=re.MULTILINE,
)

Sample = tuple[int, dict[str, int]]
"""The number of requests answered, and the memory that a process then had."""

Moment = tuple[float, float]
"""Seconds that something took, and when it began, of `time.perf_counter()`."""


class Soak:
    """Clients that share one line of questions, and a look at the memory after each `every` answers."""

    def __init__(self, server: ServerProcess, arguments: argparse.Namespace) -> None:
        self._server = server
        self._arguments = arguments
        self._questions = self._made()
        self.samples: dict[str, list[Sample]] = {}
        self.gpu_samples: dict[str, list[tuple[int, int]]] = {}
        self.news: list[float] = []
        self.counts_from = 0.0
        self.lateness: list[Moment] = []
        self.health: list[Moment] = []
        self.held: list[dict[str, int]] = []
        self.problems: list[str] = []
        self.total_s: list[float] = []
        # Before `skip` requests are answered the clients ask all at once, so that the largest steps have been by then.
        self._wave = asyncio.Barrier(arguments.clients)
        # Questions and looks take a thread's time, not that in which the clients hear.
        self._making, self._looking = asyncio.Lock(), asyncio.Lock()

    async def run(self) -> None:
        arguments = self._arguments
        await self._look()
        self.news.append(time.perf_counter())
        self._end = self.news[0] + (math.inf if arguments.seconds is None else arguments.seconds)
        async with asyncio.timeout(arguments.limit_s):
            probing = asyncio.create_task(self._probe())
            await asyncio.gather(*(self._client() for _ in range(arguments.clients)))
            probing.cancel()
        if not self.counts_from:
            raise RuntimeError(f"{len(self.total_s)} requests were answered: must be more than --skip")

    def _made(self) -> Iterator[Question]:
        arguments = self._arguments
        mixed = itertools.cycle(itertools.product(arguments.max_tokens, arguments.sizes))
        for index, (max_tokens, size) in zip(range(arguments.requests), mixed, strict=False):
            if time.perf_counter() >= self._end:
                return
            name = f"{arguments.seed}/{index}"
            yield make_question(name, size=size, kind=arguments.kind, noise=NOISE, max_tokens=max_tokens)

    async def _question(self) -> Question | None:
        async with self._making:
            return await asyncio.to_thread(next, self._questions, None)

    async def _client(self) -> None:
        client = Client(self._server.port, timeout_s=self._arguments.timeout_s)
        try:
            while (question := await self._question()) is not None:
                if len(self.total_s) < self._arguments.skip - self._arguments.clients:
                    with suppress(asyncio.BrokenBarrierError):
                        await self._wave.wait()
                else:
                    await self._wave.abort()
                    self.counts_from = self.counts_from or time.perf_counter()
                outcome = await client.ask(question)
                if outcome.problem is not None:
                    self.problems.append(f"{outcome.name}: {outcome.problem}")
                self.total_s.append(outcome.total_s)
                self.news += outcome.news
                if len(self.total_s) % self._arguments.every == 0:
                    await self._look()
        finally:
            await self._wave.abort()  # whoever waits for this one
            await client.close()

    async def _probe(self) -> None:
        """Asks for /health all the time. What fails took its time too."""
        client = Client(self._server.port, timeout_s=self._arguments.timeout_s)
        try:
            while True:
                due = time.perf_counter() + PROBE_S
                await asyncio.sleep(PROBE_S)
                sent = time.perf_counter()
                self.lateness.append((sent - due, due))
                try:
                    async with asyncio.timeout(self._arguments.timeout_s):
                        await client.exchange(GET_HEALTH)
                except (OSError, EOFError, ValueError):  # a TimeoutError is an OSError
                    await client.close()
                self.health.append((time.perf_counter() - sent, sent))
        finally:
            await client.close()

    async def _look(self) -> None:
        async with self._looking:
            await asyncio.to_thread(self._note_memory, len(self.total_s))

    def _note_memory(self, answered: int) -> None:
        self.held.append({"answered": answered} | held_by(self._server.port))
        for name, pid in self._server.processes().items():
            with suppress(OSError):  # it has just ended
                self.samples.setdefault(name, []).append((answered, memory_of(pid)))
        for name, used in gpu_memory().items():
            self.gpu_samples.setdefault(name, []).append((answered, used))


def held_by(port: int) -> dict[str, int]:
    """Gauges of /metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    return {" ".join(filter(None, found.group(1, 2))): int(float(found[3])) for found in HELD.finditer(text)}


def line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """The slope of the line of least squares, and its standard error; None for fewer than three points."""
    count = len(points)
    if count < 3:
        return None
    mean_x, mean_y = (sum(values) / count for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    rest = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    return slope, (rest / (count - 2) / spread) ** 0.5


def growth(samples: Sequence[Sample], *, skip: int, part: int) -> dict[str, Any]:
    """Of one process. skip: requests at the beginning that do not count. part: requests of a stretch whose own slope
    is told, to see whether the growth comes to an end."""
    kept = [sample for sample in samples if sample[0] >= skip]
    told: dict[str, Any] = {"samples": len(kept)}
    for kind in KINDS:
        line = line_through([(requests, memory[kind]) for requests, memory in kept])
        told[f"{kind}_bytes_a_request"] = None if line is None else round(line[0], 1)
        if kind == "rss":
            told["rss_standard_error"] = None if line is None else round(line[1], 1)
    told["rss_bytes_a_request_by_part"] = _by_part(samples, part)
    for name in (*KINDS, "threads", "descriptors"):
        told[f"{name}_first_and_last"] = [samples[0][1][name], samples[-1][1][name]]
    return told


def _by_part(samples: Sequence[Sample], part: int) -> dict[str, float | None]:
    found = {}
    for start in itertools.count(0, part):
        points = [(requests, memory["rss"]) for requests, memory in samples if start <= requests <= start + part]
        if len(points) < 2 or points[-1][0] == start:
            return found
        line = line_through(points)
        found[f"{start} to {points[-1][0]}"] = None if line is None else round(line[0], 1)
    raise AssertionError("unreachable")


def gpu_growth(samples: Sequence[tuple[int, int]], *, skip: int) -> dict[str, Any]:
    """Of one GPU, whose memory is told in MiB."""
    line = line_through([sample for sample in samples if sample[0] >= skip])
    return {
        "bytes_a_request": None if line is None else round(line[0], 1),
        "standard_error": None if line is None else round(line[1], 1),
        "first_and_last": [samples[0][1], samples[-1][1]],
        "samples": [list(sample) for sample in samples],
    }


def gpus_met(gpus: Mapping[str, dict[str, Any]]) -> dict[str, bool]:
    """Nothing where there is no GPU."""
    slopes = [gpu["bytes_a_request"] for gpu in gpus.values()]
    is_met = None not in slopes and all(slope < TARGET_BYTES for slope in slopes)
    return {f"slope of GPU memory under {TARGET_BYTES} bytes a request": is_met} if gpus else {}


def longest_stalls(
    news: Sequence[float],
    *,
    since: float,
    lateness: Sequence[Moment] = (),
    health: Sequence[Moment] = (),
    count: int = 20,
) -> list[dict[str, float]]:
    """The longest times in which nobody heard anything, and when after `since` each began, those before it left out;
    how late the clients' process was in it at most, and the longest answer of /health."""
    pairs = [(after - before, before) for before, after in itertools.pairwise(sorted(news)) if before >= since]
    return [
        {
            "ms": round(1e3 * gap, 1),
            "at_s": round(at - since, 1),
            "clients_late_ms": _longest_ms(lateness, at, at + gap),
            "health_ms": _longest_ms(health, at, at + gap),
        }
        for gap, at in sorted(pairs, reverse=True)[:count]
    ]


def _longest_ms(moments: Sequence[Moment], start: float, end: float) -> float:
    """Of those that were under way between start and end; 0 without any."""
    return round(1e3 * max((took for took, at in moments if at < end and at + took > start), default=0.0), 1)


def report(arguments: argparse.Namespace) -> dict[str, Any]:
    ran_on = machine()
    with ServerProcess(server_flags(arguments), start_s=arguments.start_s) as server:
        os.nice(NICENESS)
        soak = Soak(server, arguments)
        began = time.monotonic()
        asyncio.run(soak.run())
        seconds = time.monotonic() - began
    stalls = longest_stalls(soak.news, since=soak.counts_from, lateness=soak.lateness, health=soak.health)
    gpus = {name: gpu_growth(samples, skip=arguments.skip) for name, samples in soak.gpu_samples.items()}
    part = max(arguments.every, len(soak.total_s) // 5)
    processes = {name: growth(samples, skip=arguments.skip, part=part) for name, samples in soak.samples.items()}
    slopes = [process["rss_bytes_a_request"] for process in processes.values()]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": ran_on,
        "settings": vars(arguments),
        "answered": len(soak.total_s) - len(soak.problems),
        "lost": len(soak.problems),
        "problems": soak.problems[:10],
        "seconds": round(seconds, 1),
        "whole_answer": percentiles_ms(soak.total_s),
        "longest_stalls": stalls,
        "processes": processes,
        "gpus": gpus,
        "met": {
            f"slope of resident memory under {TARGET_BYTES} bytes a request": None not in slopes
            and all(slope < TARGET_BYTES for slope in slopes),
            f"no stall over {TARGET_STALL_S:g} s": bool(stalls) and stalls[0]["ms"] <= 1e3 * TARGET_STALL_S,
            "no request lost": not soak.problems,
        }
        | gpus_met(gpus),
        "samples": {
            name: [[requests, *(memory[kind] for kind in KINDS)] for requests, memory in samples]
            for name, samples in soak.samples.items()
        },
        "held": soak.held,
    }


def size(text: str) -> tuple[int, int]:
    """Reads "640x480"."""
    width, _, height = text.partition("x")
    return int(width), int(height)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_flags(parser)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seconds", type=float, help="after which no more requests begin")
    parser.add_argument("--sizes", type=size, nargs="+", default=[(96, 96)], metavar="WxH", help="pictures, in turns")
    parser.add_argument("--kind", choices=("png", "jpeg"), default="png", help="of the pictures' files")
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[2, 3, 4], help="of the answers, in turns")
    parser.add_argument("--clients", type=int, default=16, help="at once")
    parser.add_argument("--skip", type=int, default=1000, help="requests at the beginning that do not count")
    parser.add_argument("--every", type=int, default=100, help="requests between two looks at the memory")
    parser.add_argument("--timeout-s", type=float, default=300, help="of one request, after which it is lost")
    parser.add_argument("--limit-s", type=float, default=3600, help="of all requests together")
    parser.add_argument("--seed", default="soak", help="other pictures and questions for another")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    # So that what was started is ended.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    record = json.dumps(report(arguments), indent=1, default=str)
    print(record)
    if arguments.out is not None:
        arguments.out.write_text(record + "\n")


if __name__ == "__main__":
    main()
