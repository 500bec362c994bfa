"""A rank's end of the `direct` transport: plans come from a socket, answers go back, until the driver closes it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass

from dist_vlm.workers import wire
from dist_vlm.workers.failure import RankError
from dist_vlm.workers.frames import Disconnected, receive_frame, send_frame


@dataclass(frozen=True, slots=True)
class Hello:
    """A rank's first message. token: what the driver gave it, so that nobody else can take its place."""

    rank: int
    token: str


@dataclass(frozen=True, slots=True)
class Answer:
    """Encoded `FinishedSteps`, or in their place what went wrong: see `RankError`."""

    result: bytes
    stage: str = ""
    cause: str = ""


def serve(step: Callable[[bytes], bytes], *, rank: int, path: str, token: str) -> None:
    """Connects to the driver's socket at `path` and runs `step` on each message. Returns when the driver closes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        send_frame(connection, wire.encode(Hello(rank, token)))
        while True:
            try:
                plan = receive_frame(connection)
            except (Disconnected, ConnectionResetError):
                return
            try:
                answer = Answer(step(plan))
            except RankError as error:
                answer = Answer(b"", error.stage, error.cause)
            try:
                send_frame(connection, wire.encode(answer))
            except (BrokenPipeError, ConnectionResetError):
                return
