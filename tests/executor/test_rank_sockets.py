"""Which connections are taken for a rank's."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from dist_vlm.executor.rank_sockets import connect_ranks
from dist_vlm.executor.transport import TransportClosedError
from dist_vlm.workers import wire
from dist_vlm.workers.serve import Hello

pytestmark = pytest.mark.usefixtures("shared_ray")

Say = Callable[[str, bytes], socket.socket]


@ray.remote(num_cpus=0)
class Rank:
    """Its call lasts until it is ended; or it ends at once."""

    def stay(self) -> None:
        threading.Event().wait()

    def leave(self) -> None:
        pass

    def fail(self) -> None:
        raise ValueError("no socket here")


@pytest.fixture
def say() -> Any:
    """Connects and says something; the connections stay open."""
    opened: list[socket.socket] = []

    def connect(path: str, message: bytes) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        opened.append(connection)
        connection.settimeout(10)
        connection.connect(path)
        connection.send(message)
        return connection

    yield connect
    for connection in opened:
        connection.close()


def connect(begin: Callable[[str, str], list[Any]]) -> list[socket.socket]:
    return connect_ranks(begin, kind=socket.SOCK_SEQPACKET, receive=lambda connection: connection.recv(4096))


def test_each_rank_has_the_connection_that_showed_the_token_for_it(say: Say) -> None:
    paths: list[str] = []
    ends: dict[int, socket.socket] = {}

    def begin(path: str, token: str) -> list[Any]:
        paths.append(path)
        assert stat.S_IMODE(os.stat(Path(path).parent).st_mode) == 0o700
        say(path, b"nonsense")
        say(path, wire.encode(Hello(0, "a guess")))
        say(path, wire.encode(Hello(2, token)))
        ends[1] = say(path, wire.encode(Hello(1, token)))
        ends[0] = say(path, wire.encode(Hello(0, token)))
        return [rank.stay.remote() for rank in ranks]

    ranks = [Rank.remote() for _ in range(2)]
    connections = connect(begin)
    assert len(connections) == 2
    assert not os.path.exists(Path(paths[0]).parent)
    for number, connection in enumerate(connections):
        connection.send(b"%d" % number)
        assert ends[number].recv(10) == b"%d" % number
        connection.close()
    for rank in ranks:
        ray.kill(rank)


@pytest.mark.parametrize(("method", "expected"), [("leave", TransportClosedError), ("fail", ValueError)])
def test_a_call_that_ends_before_all_are_connected_is_told(say: Say, method: str, expected: type[Exception]) -> None:
    paths: list[str] = []

    ends: list[socket.socket] = []

    def begin(path: str, token: str) -> list[Any]:
        paths.append(path)
        ends.append(say(path, wire.encode(Hello(0, token))))
        return [ranks[0].stay.remote(), getattr(ranks[1], method).remote()]

    ranks = [Rank.remote() for _ in range(2)]
    with pytest.raises(expected):
        connect(begin)
    assert ends[0].recv(10) == b"", "it is closed"
    assert not os.path.exists(Path(paths[0]).parent)
    for rank in ranks:
        ray.kill(rank)


def test_a_long_folder_for_temporary_files_is_no_hindrance(
    tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket's path must be shorter."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))

    def begin(path: str, token: str) -> list[Any]:
        say(path, wire.encode(Hello(0, token)))
        return [Rank.remote().stay.remote()]

    (connection,) = connect(begin)
    connection.close()
    assert list(folder.iterdir()) == []
