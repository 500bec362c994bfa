"""Whether a server under load stays responsive, loses nothing and answers as it does when it is quiet. Prints JSON.

A first server answers every request by itself. A second one, whose caches are as cold, answers the same requests from
many clients at once, while another process asks for /health every 20 ms; so it does before and after, when the server
has nothing to do. No picture comes twice.

    python benchmarks/server_load.py
    python benchmarks/server_load.py --executor ray --ranks 2 --out result.json
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import gc
import json
import random
import signal
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from server_process import ServerProcess, add_server_flags, machine, memory_of, server_flags
from server_requests import GET_HEALTH, Fork, Outcome, Question, ask_all, make_question, percentiles_ms

SIZE = (1024, 768)
# Deviation of a colour: about that of a small camera.
NOISE = 4.0
WARM_UP_REQUESTS = 16
# p99 of /health under load, over that of the idle server.
TARGET_RATIO = 5.0
# The clients' processes give way to the server's.
NICENESS = 10


def poll_health(stop: Connection, port: int, interval_s: float, limit_s: float) -> dict[str, list[float]]:
    """Asks for /health over one connection until it is told to stop: when each poll was due, how late it was sent,
    and the time from sending to the last byte of the answer. One that is due before the last has its answer is left
    out. Raises `RuntimeError` for an answer other than 200."""
    seen: dict[str, list[float]] = {"late_s": [], "answer_s": []}
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        gc.disable()
        began = time.perf_counter()
        tick = 0
        while not stop.poll() and time.perf_counter() - began < limit_s:
            tick = max(tick + 1, int((time.perf_counter() - began) / interval_s) + 1)
            due = began + tick * interval_s
            time.sleep(max(0.0, due - time.perf_counter()))
            sent = time.perf_counter()
            connection.sendall(GET_HEALTH)
            _receive_answer(connection)
            seen["answer_s"].append(time.perf_counter() - sent)
            seen["late_s"].append(sent - due)
    return seen


def _receive_answer(connection: socket.socket) -> None:
    data = b""
    while b"\r\n\r\n" not in data:
        data += _received(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    while len(body) < length:
        body += _received(connection)
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"/health: {head.splitlines()[0].decode()}: {body[:300].decode()}")


def _received(connection: socket.socket) -> bytes:
    data = connection.recv(4096)
    if not data:
        raise RuntimeError("the server closed the connection that asks for /health")
    return data


def ask(_: Connection, port: int, turns: Sequence[Sequence[Question]], timeout_s: float) -> list[Outcome]:
    gc.disable()
    return asyncio.run(ask_all(port, turns, timeout_s=timeout_s))


class Load:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._end = time.monotonic() + arguments.limit_s
        self._warm_up = [self._question(f"warm-up {index}") for index in range(WARM_UP_REQUESTS)]
        self.turns = [
            [self._question(f"{client}/{turn}") for turn in range(arguments.requests)]
            for client in range(arguments.clients)
        ]
        self.questions = [question for questions in self.turns for question in questions]

    def quiet(self) -> tuple[dict[str, Any], dict[str, Outcome]]:
        """One request at a time: figures, and the outcome of each by its name."""
        _say(f"quiet: {len(self.questions)} requests, one at a time")
        with self._server() as server:
            self._ask(server, [self._warm_up])
            began = time.monotonic()
            outcomes = self._ask(server, [self.questions])
            seconds = time.monotonic() - began
        right = sum(
            outcome.text.startswith(question.answer) for outcome, question in zip(outcomes, self.questions, strict=True)
        )
        return figures(outcomes, seconds) | {"as_drawn": right}, {outcome.name: outcome for outcome in outcomes}

    def loaded(self) -> tuple[dict[str, Any], list[Outcome]]:
        """All clients at once, between two times of idleness."""
        arguments = self._arguments
        with self._server() as server:
            self._ask(server, [self._warm_up[::2], self._warm_up[1::2]])
            _say(f"idle: /health for {arguments.idle_s:g} s")
            before = self._idle(server, arguments.idle_s)
            _say(f"loaded: {arguments.clients} clients")
            poller = self._poller(server)
            began = time.monotonic()
            outcomes = self._ask(server, self.turns)
            seconds = time.monotonic() - began
            health = _health(poller)
            memory = {name: memory_of(pid) for name, pid in server.processes().items()}
            _say(f"idle again: /health for {seconds:.0f} s")
            after = self._idle(server, seconds)
            ready_s = server.ready_s
        record = figures(outcomes, seconds)
        record["health"] = {"idle": before, "loaded": health, "idle_again": after}
        for idle, name in ((before, "p99_to_idle"), (after, "p99_to_idle_again")):
            record["health"][name] = round(health["answer"]["p99_ms"] / idle["answer"]["p99_ms"], 2)
        return record | {"memory": memory, "ready_s": round(ready_s, 1)}, outcomes

    def _question(self, name: str) -> Question:
        arguments = self._arguments
        name = f"{arguments.seed}/{name}"
        spread = random.Random(name).randint(-arguments.spread, arguments.spread)
        max_tokens = max(1, arguments.max_tokens + spread)
        return make_question(name, size=SIZE, kind=arguments.kind, noise=NOISE, max_tokens=max_tokens)

    def _server(self) -> ServerProcess:
        return ServerProcess(server_flags(self._arguments), start_s=self._arguments.start_s)

    def _ask(self, server: ServerProcess, turns: Sequence[Sequence[Question]]) -> list[Outcome]:
        fork = Fork(ask, server.port, turns, self._arguments.timeout_s, niceness=NICENESS)
        outcomes: list[Outcome] = fork.result(max(1.0, self._end - time.monotonic()))
        return outcomes

    def _poller(self, server: ServerProcess) -> Fork:
        return Fork(poll_health, server.port, self._arguments.interval_ms / 1e3, self._arguments.limit_s)

    def _idle(self, server: ServerProcess, seconds: float) -> dict[str, Any]:
        poller = self._poller(server)
        time.sleep(seconds)
        return _health(poller)


def figures(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    answered = [outcome for outcome in outcomes if outcome.problem is None]
    return {
        "sent": len(outcomes),
        "answered": len(answered),
        "lost": len(outcomes) - len(answered),
        "problems": sorted({outcome.problem for outcome in outcomes if outcome.problem is not None})[:10],
        "seconds": round(seconds, 2),
        "tokens_per_s": round(sum(outcome.num_tokens for outcome in answered) / seconds, 1),
        "first_token": percentiles_ms([outcome.first_s for outcome in answered]),
        "whole_answer": percentiles_ms([outcome.total_s for outcome in answered]),
    }


def report(arguments: argparse.Namespace) -> dict[str, Any]:
    ran_on = machine()
    load = Load(arguments)
    quiet, expected = load.quiet()
    loaded, outcomes = load.loaded()
    differing = [
        outcome.name
        for outcome in outcomes
        if outcome.problem is None
        and (outcome.text, outcome.num_tokens) != (expected[outcome.name].text, expected[outcome.name].num_tokens)
    ]
    lost = quiet["lost"] + loaded["lost"]
    ratio = loaded["health"]["p99_to_idle"]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": ran_on,
        "settings": vars(arguments) | {"size": SIZE, "noise": NOISE},
        "body_bytes": sum(len(question.body) for question in load.questions) // len(load.questions),
        "quiet": quiet,
        "loaded": loaded,
        "differing_from_quiet": {"count": len(differing), "names": differing[:20]},
        "met": {
            f"health p99 at most {TARGET_RATIO:g} x idle": ratio <= TARGET_RATIO,
            "no request lost": lost == 0,
            "tokens equal to the quiet run": not differing and lost == 0,
        },
    }


def _health(poller: Fork) -> dict[str, Any]:
    poller.tell()
    seen = poller.result(60)
    return {"answer": percentiles_ms(seen["answer_s"]), "sent_late": percentiles_ms(seen["late_s"])}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_flags(parser)
    parser.add_argument("--clients", type=int, default=32, help="at once")
    parser.add_argument("--requests", type=int, default=16, help="of each client, one after the other")
    parser.add_argument("--max-tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--spread", type=int, default=0, help="tokens that answers are longer or shorter, by chance")
    parser.add_argument("--kind", choices=("jpeg", "png"), default="jpeg", help="of the pictures' files")
    parser.add_argument("--interval-ms", type=float, default=20, help="between two polls of /health")
    parser.add_argument("--idle-s", type=float, default=30, help="of polling the idle server, before the load")
    parser.add_argument("--timeout-s", type=float, default=300, help="of one request, after which it is lost")
    parser.add_argument("--limit-s", type=float, default=1800, help="of all requests together")
    parser.add_argument("--seed", default="load", help="other pictures and questions for another")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    # So that what was started is ended.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    record = json.dumps(report(arguments), indent=2, default=str)
    print(record)
    if arguments.out is not None:
        arguments.out.write_text(record + "\n")


if __name__ == "__main__":
    main()
