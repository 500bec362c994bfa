"""Who knows the key and who does not, by every spelling of a path and of a header."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from dist_vlm.server.auth import OPEN_PATHS, Authentication

from .asgi import Client, Header, http_scope

KEY = "sk-Secret:key.1"


class App:
    """Answers everything, and says so."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"secret"})


def ask(scope: Scope, *, key: str = KEY, open_paths: tuple[str, ...] = OPEN_PATHS) -> tuple[bool, Client]:
    """Whether the application was reached, and what the client got."""
    app, client = App(), Client()
    guarded = Authentication(app, api_key=key, open_paths=open_paths)
    asyncio.run(guarded(scope, client.receive, client.send))
    assert len(app.scopes) <= 1
    if not app.scopes:
        assert b"secret" not in client.body
        assert KEY not in repr(client.sent)
    return bool(app.scopes), client


def bearer(key: str) -> Header:
    return ("authorization", f"Bearer {key}")


def basic(user_and_password: str) -> Header:
    return ("authorization", "Basic " + base64.b64encode(user_and_password.encode()).decode())


def knows(*headers: Header, key: str = KEY) -> bool:
    reached, client = ask(http_scope("/v1/models", method="GET", headers=headers), key=key)
    assert client.status == (200 if reached else 401)
    return reached


# --------------------------------------------------------------------- paths


@pytest.mark.parametrize("path", ["/health", "/ready"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_health_and_readiness_need_no_key(path: str, method: str) -> None:
    assert ask(http_scope(path, method=method))[0]
    assert ask(http_scope(path, method=method, headers=[bearer("wrong")]))[0]


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "",
        "*",
        "/v1/models",
        "/v1/chat/completions",
        "/metrics",
        "/version",
        "/openapi.json",
        "/page.js",
        "/nothing",
        "//health",
        "/health/",
        "/health//",
        "/HEALTH",
        "/Health",
        "/healthz",
        "/health.json",
        "/health ",
        " /health",
        "/health\t",
        "/health\n",
        "/health\x00",
        "/health%00",
        "/health%2f",
        "/%68ealth",
        "%2fhealth",
        "/health?x",
        "/health#x",
        "/health;x",
        "/health/../v1/models",
        "/health/..",
        "/./health",
        "/v1/../health",
        "/v1/health",
        "/health/v1/models",
        "\\health",
        "/health\\",
        "/ready/",
        "/ready/../metrics",
        "http://127.0.0.1/health",
        "health",
        "/hеalth",  # a Cyrillic е
        "/healt\u0068\u0301",
    ],
)
def test_every_other_path_needs_the_key_and_so_does_every_other_spelling(path: str) -> None:
    """As an ASGI server hands them over: decoded once."""
    for method in ("GET", "POST", "OPTIONS", "HEAD", "DELETE", "FOO"):
        reached, client = ask(http_scope(path, method=method))
        assert not reached
        assert client.status == 401
    assert ask(http_scope(path, headers=[bearer(KEY)]))[0]


def test_neither_query_raw_path_nor_root_path_opens_a_path() -> None:
    for more in ({"query_string": b"/health"}, {"raw_path": b"/health"}, {"root_path": "/health"}):
        assert not ask({**http_scope("/v1/models"), **more})[0]


def test_open_paths_are_those_that_are_given() -> None:
    assert ask(http_scope("/api/health"), open_paths=("/api/health",))[0]
    assert not ask(http_scope("/health"), open_paths=("/api/health",))[0]


# ------------------------------------------------------------------- headers


@pytest.mark.parametrize(
    "value",
    [
        f"Bearer {KEY}",
        f"bearer {KEY}",
        f"BEARER {KEY}",
        f"Bearer   {KEY}",
        f"Bearer {KEY}  ",
        basic(f"anyone:{KEY}")[1],
        basic(f":{KEY}")[1],
        basic(f"anyone:{KEY}")[1].replace("Basic", "basic"),
    ],
)
def test_the_key_is_known_in_these_forms(value: str) -> None:
    assert knows(("authorization", value))
    assert knows(("Authorization", value))


@pytest.mark.parametrize(
    "value",
    [
        "",
        KEY,
        "Bearer",
        "Bearer ",
        f"Bearer{KEY}",
        f"Bearer\t{KEY}",
        f" Bearer {KEY}",
        f"Bearer {KEY[:-1]}",
        f"Bearer {KEY}x",
        f"Bearer x{KEY}",
        f"Bearer {KEY.upper()}",
        f"Bearer {KEY} {KEY}",
        f"Bearer {KEY},",
        f"Bearer \xa0{KEY}",
        f'Bearer "{KEY}"',
        f"Token {KEY}",
        f"Bearer Bearer {KEY}",
        f"Basic {KEY}",
        "Basic",
        "Basic !!!",
        "Basic \xff\xfe",
        basic(KEY)[1],
        basic(f"{KEY}:")[1],
        basic(f"{KEY}:wrong")[1],
        basic(f"x:{KEY} ")[1],
        basic(f"x:y:{KEY}")[1],
        basic("")[1],
        basic(":")[1],
        basic(f"anyone:{KEY}")[1][:-1],
        basic(f"anyone:{KEY}")[1] + "\n",
        "Bearer \xff\xfe",
        "Bearer " + "x" * 100_000,
    ],
)
def test_no_other_value_is_taken_for_the_key(value: str) -> None:
    assert not knows(("authorization", value))


def test_a_key_in_another_place_does_not_count() -> None:
    for header in (
        ("x-api-key", KEY),
        ("api-key", KEY),
        ("cookie", f"key={KEY}"),
        ("proxy-authorization", f"Bearer {KEY}"),
    ):
        assert not knows(header)
    assert not ask(http_scope("/v1/models", query_string=f"key={KEY}&api_key={KEY}".encode()))[0]


def test_of_two_headers_none_counts() -> None:
    """Who stands between client and server may have looked at the other one."""
    for headers in ((bearer(KEY), bearer("x")), (bearer("x"), bearer(KEY)), (bearer(KEY), bearer(KEY))):
        assert not knows(*headers)


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[Any, Any]] = []
    compare = hmac.compare_digest

    def watched(first: Any, second: Any) -> bool:
        compared.append((first, second))
        return compare(first, second)

    monkeypatch.setattr(hmac, "compare_digest", watched)

    class Bytes(bytes):
        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared byte by byte")

        __hash__ = bytes.__hash__

    guarded = Authentication(App(), api_key=KEY)
    guarded._key = Bytes(guarded._key)
    for value in (KEY, KEY[:-1] + "2", "x"):
        assert guarded._knows(f"Bearer {value}") == (value == KEY)
        assert guarded._knows(basic(f"u:{value}")[1]) == (value == KEY)
    assert len(compared) == 6


# ------------------------------------------------------------------- answers


def refusal(*headers: Header, method: str = "GET") -> Client:
    reached, client = ask(http_scope("/", method=method, headers=headers))
    assert not reached
    return client


def test_a_refusal_is_openais_error_and_says_what_is_missing() -> None:
    client = refusal()
    error = json.loads(client.body)["error"]
    assert (client.status, error["type"], error["code"]) == (401, "authentication_error", "invalid_api_key")
    assert "no key" in error["message"]
    assert "Authorization: Bearer KEY" in error["message"]
    assert "a wrong key" in json.loads(refusal(bearer("x")).body)["error"]["message"]
    assert client.headers["www-authenticate"] == "Bearer"


def test_a_browser_that_wants_a_page_asks_its_person_for_the_key() -> None:
    page = ("accept", "text/html,application/xhtml+xml")
    assert refusal(page).headers["www-authenticate"].startswith("Basic realm=")
    assert refusal(("accept", "*/*")).headers["www-authenticate"] == "Bearer"
    assert refusal(page, method="POST").headers["www-authenticate"] == "Bearer"


# -------------------------------------------------------- other connections


def test_the_start_and_the_end_of_the_server_go_through() -> None:
    assert ask({"type": "lifespan"})[0]


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_a_websocket_is_closed_before_it_opens(path: str) -> None:
    scope = {**http_scope(path, headers=[bearer(KEY)]), "type": "websocket"}
    reached, client = ask(scope)
    assert not reached
    expected: list[Message] = [{"type": "websocket.close", "code": 1008}]
    assert client.sent == expected


def test_any_other_connection_is_an_error() -> None:
    with pytest.raises(ValueError, match="type 'ftp' is not served"):
        ask({**http_scope("/health", headers=[bearer(KEY)]), "type": "ftp"})
