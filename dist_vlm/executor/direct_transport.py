"""Plans through unix sockets, between the driver and ranks on the driver's machine.

A blocked reader sleeps in the kernel, so nothing spins: on a machine with few cores a compiled graph's readers, which
spin, take the cores that the ranks compute on.
"""

from __future__ import annotations

import secrets
import select
import shutil
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_vlm.executor.transport import Transport, TransportClosedError, TransportTimeoutError
from dist_vlm.workers import wire
from dist_vlm.workers.failure import RankError
from dist_vlm.workers.frames import Disconnected, receive_frame, send_frame
from dist_vlm.workers.serve import Answer, Hello

# How often an accept looks whether a rank's call has already failed.
_ACCEPT_POLL_S = 0.2


class DirectTransport(Transport):
    """One stream socket a rank. The socket's directory is this user's alone, and a rank shows a random token."""

    def __init__(self, actors: Sequence[Any], *, depth: int, send_timeout_s: float) -> None:
        self._depth = depth
        self._send_timeout_s = send_timeout_s
        self._num_unanswered = 0
        self._early: list[deque[bytes]] = [deque() for _ in actors]
        self._connections: list[socket.socket] = []
        self._closing = threading.Lock()
        self._closed = False
        token, folder = secrets.token_hex(16), Path(tempfile.mkdtemp(prefix="dvlm-"))
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                listener.bind(str(folder / "plans"))
                listener.listen(len(actors))
                serving = [actor.serve.remote(str(folder / "plans"), token) for actor in actors]
                self._connections = _accept_all(listener, serving, token)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def send(self, message: bytes) -> None:
        if self._num_unanswered >= self._depth:
            raise RuntimeError(f"{self._depth} messages are unanswered already")
        try:
            for connection in self._connections:
                connection.settimeout(self._send_timeout_s)
                send_frame(connection, message)
        except TimeoutError:
            raise TransportTimeoutError("the ranks did not take a plan in time") from None
        except OSError as error:
            raise TransportClosedError(type(error).__name__) from None
        self._num_unanswered += 1

    def receive(self, timeout_s: float) -> list[bytes]:
        if self._num_unanswered == 0:
            raise RuntimeError("receive() with no message unanswered")
        end = time.monotonic() + timeout_s
        while not all(self._early):
            self._read_some(end, timeout_s)
        self._num_unanswered -= 1
        return [answers.popleft() for answers in self._early]

    def _read_some(self, end: float, timeout_s: float) -> None:
        """Takes a message from each rank that has one; a rank ahead of the others may have answered twice."""
        poll, rank_of = select.poll(), {}
        try:
            for rank, connection in enumerate(self._connections):
                if not self._early[rank]:
                    poll.register(connection, select.POLLIN)
                    rank_of[connection.fileno()] = rank
            ready = poll.poll(max(0.0, end - time.monotonic()) * 1000)
            if not ready:
                raise TransportTimeoutError(f"no answer in {timeout_s:g} s")
            for descriptor, _ in ready:
                rank = rank_of[descriptor]
                self._connections[rank].settimeout(max(0.001, end - time.monotonic()))
                self._early[rank].append(_result(rank, receive_frame(self._connections[rank])))
        except TimeoutError:
            raise TransportTimeoutError(f"no answer in {timeout_s:g} s") from None
        except (OSError, ValueError) as error:
            # A socket closed by another thread has the descriptor -1, which poll refuses as a value.
            raise TransportClosedError(type(error).__name__) from None

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes a receive under way, in whichever thread
            connection.close()


def _result(rank: int, frame: bytes) -> bytes:
    answer = wire.decode(Answer, frame)
    if answer.stage:
        raise RankError(rank, answer.stage, answer.cause)
    return answer.result


def _accept_all(listener: socket.socket, serving: Sequence[Any], token: str) -> list[socket.socket]:
    """One connection a rank, in rank order. Raises what a rank's call raised if it ended before it connected."""
    import ray

    connections: dict[int, socket.socket] = {}
    listener.settimeout(_ACCEPT_POLL_S)
    while len(connections) < len(serving):
        ended, _ = ray.wait(list(serving), timeout=0)
        if ended:
            ray.get(ended)
            raise TransportClosedError("a rank left before all had connected")
        with suppress(TimeoutError):
            connection, _ = listener.accept()
            connection.settimeout(None)
            try:
                hello = wire.decode(Hello, receive_frame(connection))
            except (wire.WireError, Disconnected, OSError):
                connection.close()
                continue
            if secrets.compare_digest(hello.token, token) and 0 <= hello.rank < len(serving):
                connections[hello.rank] = connection
            else:
                connection.close()
    return [connections[rank] for rank in range(len(serving))]
