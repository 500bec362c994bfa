"""Plans through unix sockets, between the driver and ranks on the driver's machine.

A blocked reader sleeps in the kernel, so nothing spins: on a machine with few cores a compiled graph's readers, which
spin, take the cores that the ranks compute on.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from dist_vlm.executor.rank_sockets import connect_ranks
from dist_vlm.executor.transport import Transport, TransportClosedError, TransportTimeoutError
from dist_vlm.workers import wire
from dist_vlm.workers.failure import RankError
from dist_vlm.workers.frames import Disconnected, FrameBuffer, frame, receive_frame
from dist_vlm.workers.serve import Answer

_READ_BYTES = 1 << 18


class DirectTransport(Transport):
    """One stream socket a rank.

    A rank reads its next plan when it has written its answer, and a socket holds some 200 KB: so answers are read
    while a long plan is being written, or both ends would wait for each other.
    """

    def __init__(self, actors: Sequence[Any], *, depth: int, send_timeout_s: float) -> None:
        self._depth = depth
        self._send_timeout_s = send_timeout_s
        self._num_unanswered = 0
        self._parts = [FrameBuffer() for _ in actors]
        self._answers: list[deque[Answer]] = [deque() for _ in actors]
        self._unsent = [memoryview(b"") for _ in actors]
        self._closing = threading.Lock()
        self._closed = False
        self._connections = connect_ranks(
            lambda path, token: [actor.serve.remote(path, token) for actor in actors],
            kind=socket.SOCK_STREAM,
            receive=receive_frame,
        )
        for connection in self._connections:
            connection.setblocking(False)

    def send(self, message: bytes) -> None:
        if self._num_unanswered >= self._depth:
            raise RuntimeError(f"{self._depth} messages are unanswered already")
        end = time.monotonic() + self._send_timeout_s
        self._unsent = [memoryview(frame(message))] * len(self._connections)
        try:
            for rank in range(len(self._connections)):
                self._write(rank)
            while any(map(len, self._unsent)):
                self._exchange(end)
        except TimeoutError:
            raise TransportTimeoutError("the ranks did not take a plan in time") from None
        except (OSError, ValueError) as error:
            raise TransportClosedError(type(error).__name__) from None
        self._num_unanswered += 1

    def receive(self, timeout_s: float) -> list[bytes]:
        if self._num_unanswered == 0:
            raise RuntimeError("receive() with no message unanswered")
        end = time.monotonic() + timeout_s
        try:
            while not self._have_answers():
                self._exchange(end)
        except TimeoutError:
            raise TransportTimeoutError(f"no answer in {timeout_s:g} s") from None
        except (OSError, ValueError) as error:
            # A socket closed by another thread has the descriptor -1, which poll refuses as a value.
            raise TransportClosedError(type(error).__name__) from None
        self._num_unanswered -= 1
        return [answers.popleft().result for answers in self._answers]

    def _have_answers(self) -> bool:
        """Whether every rank has answered the oldest message. Raises `RankError` if one failed, whoever is missing."""
        for rank, answers in enumerate(self._answers):
            if answers and answers[0].stage:
                raise RankError(rank, answers[0].stage, answers[0].cause)
        return all(self._answers)

    def _exchange(self, end: float) -> None:
        """Waits until a rank can be read from or written to, and does so. Raises `TimeoutError` after `end`."""
        poll, rank_of = select.poll(), {}
        for rank, connection in enumerate(self._connections):
            poll.register(connection, select.POLLIN | (select.POLLOUT if self._unsent[rank] else 0))
            rank_of[connection.fileno()] = rank
        ready = poll.poll(max(0.0, end - time.monotonic()) * 1000)
        if not ready:
            raise TimeoutError
        for descriptor, events in ready:
            # An error or a hangup is left to the read, which tells of it.
            if events & ~select.POLLOUT:
                self._read(rank_of[descriptor])
            if events & select.POLLOUT:
                self._write(rank_of[descriptor])

    def _read(self, rank: int) -> None:
        with suppress(BlockingIOError):
            part = self._connections[rank].recv(_READ_BYTES)
            if not part:
                raise Disconnected("a rank closed its connection")
            self._answers[rank].extend(wire.decode(Answer, message) for message in self._parts[rank].feed(part))

    def _write(self, rank: int) -> None:
        with suppress(BlockingIOError):
            num_sent = self._connections[rank].send(self._unsent[rank])
            self._unsent[rank] = self._unsent[rank][num_sent:]

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes a call under way, in whichever thread
            connection.close()
