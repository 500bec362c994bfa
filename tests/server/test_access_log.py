"""One line and one count for each request, whatever clients put into them."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from dist_vlm.server.access_log import AccessLog
from dist_vlm.server.metrics import Metrics

from .asgi import Client, Header, http_scope

PATHS = frozenset({"/health", "/v1/models"})
LINE = re.compile(r"(\S+) (\S+) (\d+) (\d+\.\d) ms client=(\S+) id=(\S+)")


async def fine(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse(f"id={scope['state']['request_id']}", 201)(scope, receive, send)


class Rig:
    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="dist_vlm.access")
        self._caplog = caplog
        self.metrics = Metrics("m")

    def ask(
        self,
        *headers: Header,
        path: str = "/health",
        app: Callable[[Scope, Receive, Send], Awaitable[None]] = fine,
        quiet: bool = False,
        **more: Any,
    ) -> Client:
        client = Client()
        log = AccessLog(app, metrics=self.metrics, paths=PATHS, quiet=quiet)
        scope = http_scope(path, method="GET", headers=headers, **{"client": ("192.0.2.7", 4321), **more})
        asyncio.run(log(scope, client.receive, client.send))
        return client

    @property
    def lines(self) -> list[str]:
        return [record.getMessage() for record in self._caplog.records]

    @property
    def line(self) -> tuple[str, ...]:
        """The words of the only line."""
        (line,) = self.lines
        found = LINE.fullmatch(line)
        assert found, line
        self._caplog.clear()
        return found.groups()

    def counted(self, path: str, status: int) -> float:
        value = self.metrics.registry.get_sample_value(
            "dist_vlm:http_responses_total", {"path": path, "status": str(status)}
        )
        return value or 0.0


@pytest.fixture
def rig(caplog: pytest.LogCaptureFixture) -> Rig:
    return Rig(caplog)


def test_a_request_takes_a_line_with_all_that_is_known(rig: Rig) -> None:
    client = rig.ask(("x-request-id", "abc-1"))
    method, path, status, milliseconds, host, request_id = rig.line
    assert (method, path, status, host, request_id) == ("GET", "/health", "201", "192.0.2.7", "abc-1")
    assert 0 <= float(milliseconds) < 1000
    assert client.status == 201
    assert rig.counted("/health", 201) == 1


def test_the_time_of_a_request_is_until_its_response_has_ended(rig: Rig) -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(0.03)
        await send({"type": "http.response.body", "body": b""})

    rig.ask(app=slow)
    assert float(rig.line[3]) >= 29


# ------------------------------------------------------------------------ id


@pytest.mark.parametrize("given", ["a", "req_0123.45-Z", "x" * 64])
def test_a_clients_id_is_taken_and_sent_back(rig: Rig, given: str) -> None:
    client = rig.ask(("X-Request-ID", given))
    assert client.headers["x-request-id"] == given
    assert client.body == f"id={given}".encode(), "and the application knows it"
    assert rig.line[-1] == given


@pytest.mark.parametrize(
    "given",
    ["", "x" * 65, "a b", "a\nb", "a\r\nSet-Cookie: x", "a\n", "é", "a/b", "<script>", "a=b", "a,b", "%0a", "a\x00b"],
)
def test_an_evil_id_is_replaced(rig: Rig, given: str) -> None:
    client = rig.ask(("x-request-id", given))
    own = client.headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", own)
    assert client.body == f"id={own}".encode()
    assert rig.line[-1] == own


def test_requests_without_an_id_get_different_ones(rig: Rig) -> None:
    ids = {rig.ask().headers["x-request-id"] for _ in range(50)}
    assert len(ids) == 50


def test_a_response_has_one_id_whatever_the_application_sets(rig: Rig) -> None:
    async def own(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("", headers={"X-Request-Id": "other", "X-Else": "1"})(scope, receive, send)

    client = rig.ask(("x-request-id", "abc"), app=own)
    names = [name for name, _ in client.sent[0]["headers"]]
    assert names.count(b"x-request-id") == 1
    assert (client.headers["x-request-id"], client.headers["x-else"]) == ("abc", "1")


def test_a_response_without_headers_gets_the_id(rig: Rig) -> None:
    async def bare(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    assert rig.ask(("x-request-id", "abc"), app=bare).headers == {"x-request-id": "abc"}


# ------------------------------------------------------------------- forgery


@pytest.mark.parametrize(
    "path",
    [
        "/a\nGET /forged 200 0.1 ms client=1.1.1.1 id=x",
        "/a\r\nGET /forged",
        "/a\x1b[2Jb\x00",
        "/a\u2028b\x85c",
        "/a 200 0.1 ms client=1.1.1.1 id=forged",
        "/%0aforged",
        "/'\"\\",
        "/\ud800",
        "/é/図",
        "/?a=b#c",
    ],
)
def test_no_path_writes_a_line_or_a_word_of_its_own(rig: Rig, path: str) -> None:
    rig.ask(("x-request-id", "abc"), path=path)
    _, shown, status, _, host, request_id = rig.line
    assert (status, host, request_id) == ("201", "192.0.2.7", "abc")
    assert shown.isascii()
    assert shown.isprintable()


def test_a_long_path_is_cut(rig: Rig) -> None:
    rig.ask(path="/" + "é" * 100_000)
    assert len(rig.line[1]) < 1500


def test_a_client_address_that_a_proxy_handed_on_forges_nothing(rig: Rig) -> None:
    rig.ask(client=("1.1.1.1 id=forged\nx", 0))
    assert "\n" not in rig.line[4]


def test_a_client_without_an_address_is_a_dash(rig: Rig) -> None:
    rig.ask(client=None)
    assert rig.line[4] == "-"


def test_an_ipv6_address_is_readable(rig: Rig) -> None:
    rig.ask(client=("2001:db8::7", 1))
    assert rig.line[4] == "2001:db8::7"


def test_the_query_is_not_logged(rig: Rig) -> None:
    """It may hold a key."""
    rig.ask(query_string=b"key=sk-secret")
    assert "secret" not in " ".join(rig.lines)


# -------------------------------------------------------------------- counts


def test_paths_that_are_not_routes_are_counted_together(rig: Rig) -> None:
    """Else a client could make as many series as it likes."""
    for path in ("/a", "/b", "/health/", "/health?x"):
        rig.ask(path=path)
    assert rig.counted("other", 201) == 4
    assert rig.counted("/a", 201) == 0


def test_a_route_behind_a_proxys_prefix_is_counted_as_itself(rig: Rig) -> None:
    rig.ask(path="/api/v1/models", root_path="/api")
    assert rig.counted("/v1/models", 201) == 1
    assert rig.line[1] == "/v1/models"


def test_a_failure_is_a_500_and_goes_on(rig: Rig) -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        rig.ask(app=fails)
    assert rig.line[2] == "500"
    assert rig.counted("/health", 500) == 1


def test_a_failure_after_the_status_was_sent_leaves_that_status(rig: Rig) -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError("x")

    with pytest.raises(KeyError):
        rig.ask(app=fails)
    assert rig.line[2] == "200"


def test_a_client_that_left_before_the_status_is_a_499(rig: Rig) -> None:
    async def gone(scope: Scope, receive: Receive, send: Send) -> None:
        return

    async def cancelled(scope: Scope, receive: Receive, send: Send) -> None:
        raise asyncio.CancelledError

    rig.ask(app=gone)
    assert rig.line[2] == "499"
    with pytest.raises(asyncio.CancelledError):
        rig.ask(app=cancelled)
    assert rig.line[2] == "499"
    assert rig.counted("/health", 499) == 2


def test_quiet_counts_and_writes_nothing(rig: Rig) -> None:
    client = rig.ask(("x-request-id", "abc"), quiet=True)
    assert rig.lines == []
    assert rig.counted("/health", 201) == 1
    assert client.headers["x-request-id"] == "abc"


def test_other_connections_go_through(rig: Rig) -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    client = Client()
    log = AccessLog(app, metrics=rig.metrics, paths=PATHS, quiet=False)
    for kind in ("lifespan", "websocket"):
        asyncio.run(log({"type": kind}, client.receive, client.send))
    assert seen == ["lifespan", "websocket"]
    assert rig.lines == []
