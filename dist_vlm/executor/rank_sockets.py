"""Unix sockets between the driver and ranks on its machine: one connection a rank."""

from __future__ import annotations

import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_vlm.executor.temp_folder import short_base
from dist_vlm.executor.transport import TransportClosedError
from dist_vlm.workers import wire
from dist_vlm.workers.frames import Disconnected
from dist_vlm.workers.serve import Hello

# How often an accept looks whether a rank's call has already failed.
_ACCEPT_POLL_S = 0.2


def connect_ranks(
    begin: Callable[[str, str], Sequence[Any]],
    *,
    kind: socket.SocketKind,
    receive: Callable[[socket.socket], bytes],
) -> list[socket.socket]:
    """One connection a rank, in rank order. The socket's directory is this user's alone; a rank shows a random token.

    begin: has every rank connect to a path and say `Hello` with a token; returns their calls, which last as long as
        the connections.
    receive: reads a message.
    Raises what a rank's call raised if it ended before it connected.
    """
    token, folder = secrets.token_hex(16), Path(tempfile.mkdtemp(prefix="dvlm-", dir=short_base()))
    try:
        with socket.socket(socket.AF_UNIX, kind) as listener:
            listener.bind(str(folder / "ranks"))
            # No rank waits in line, however many there are.
            listener.listen(socket.SOMAXCONN)
            calls = begin(str(folder / "ranks"), token)
            return _accept_all(listener, calls, token, receive)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _accept_all(
    listener: socket.socket, calls: Sequence[Any], token: str, receive: Callable[[socket.socket], bytes]
) -> list[socket.socket]:
    import ray

    connections: dict[int, socket.socket] = {}
    listener.settimeout(_ACCEPT_POLL_S)
    try:
        while len(connections) < len(calls):
            ended, _ = ray.wait(list(calls), timeout=0)
            if ended:
                ray.get(ended)
                raise TransportClosedError("a rank left before all had connected")
            with suppress(TimeoutError):
                connection, _ = listener.accept()
                connection.settimeout(None)
                rank = _rank_of(connection, len(calls), token, receive)
                if rank is None:
                    connection.close()
                else:
                    connections[rank] = connection
    except BaseException:
        for connection in connections.values():
            connection.close()
        raise
    return [connections[rank] for rank in range(len(calls))]


def _rank_of(
    connection: socket.socket, num_ranks: int, token: str, receive: Callable[[socket.socket], bytes]
) -> int | None:
    """Which rank is at the other end; None for a stranger."""
    try:
        hello = wire.decode(Hello, receive(connection))
    except (wire.WireError, Disconnected, OSError):
        return None
    return hello.rank if secrets.compare_digest(hello.token, token) and 0 <= hello.rank < num_ranks else None
