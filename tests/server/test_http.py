"""What comes before a request's body has its bounds."""

from __future__ import annotations

import socket
import time

import pytest

from dist_vlm.server.http import MAX_HEAD_BYTES

from .live import Live


def connect(live: Live) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(live.url.rsplit(":", 1)[1])), timeout=5)


def rest_of(connection: socket.socket) -> bytes:
    answer = b""
    while part := connection.recv(65536):
        answer += part
    return answer


def test_a_header_without_end_is_cut_off(live: Live) -> None:
    sent = 0
    with connect(live) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: ")
        with pytest.raises(OSError, match=r"(reset|pipe)"):
            while sent < 100 * MAX_HEAD_BYTES:
                connection.sendall(b"x" * 4096)
                sent += 4096
                time.sleep(0.0005)
    assert MAX_HEAD_BYTES <= sent < 20 * MAX_HEAD_BYTES


@pytest.mark.parametrize(("num_headers", "status"), [(10, b"200"), (100, b"400")])
def test_many_headers_are_refused_together(live: Live, num_headers: int, status: bytes) -> None:
    headers = b"".join(b"X-%d: %s\r\n" % (number, b"y" * 1000) for number in range(num_headers))
    with connect(live) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + headers + b"\r\n")
        assert rest_of(connection).startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize("begins", [b"", b"GET /health HTTP/1.1\r\nHost: "])
def test_a_client_that_does_not_go_on_is_left(live: Live, monkeypatch: pytest.MonkeyPatch, begins: bytes) -> None:
    monkeypatch.setattr("dist_vlm.server.http.HEAD_TIMEOUT_S", 0.2)
    began = time.monotonic()
    with connect(live) as connection:
        connection.sendall(begins)
        assert rest_of(connection) == b""
    assert time.monotonic() - began < 3


def test_a_connection_that_is_kept_answers_one_request_after_the_other(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_vlm.server.http.HEAD_TIMEOUT_S", 0.2)
    with connect(live) as connection:
        for _ in range(3):
            connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            time.sleep(0.3)  # longer than a head may take, but none has begun
        body = b'{"prompt": "' + b"a" * 60_000 + b'"}'
        head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body))
        time.sleep(0.3)  # a body has its own limit
        connection.sendall(body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 400")
