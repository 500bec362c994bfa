"""Bodies that are too long, too slow, or no JSON, as an ASGI server would hand them over."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect

from dist_vlm.server import body
from dist_vlm.server.body import BodyReader, parse_object
from dist_vlm.server.errors import ApiError

from .asgi import JSON, Client, Header, part, parts

MOST = 100


def read(client: Client, *headers: Header, timeout_s: float = 5.0) -> dict[str, Any]:
    """Within a second or so, whatever the client does."""

    async def main() -> dict[str, Any]:
        async with asyncio.timeout(3):
            return await BodyReader(max_bytes=MOST, timeout_s=timeout_s).read(client.request(JSON, *headers))

    return asyncio.run(main())


def refused(work: Callable[[], object]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        work()
    return caught.value


def length(value: object) -> Header:
    return ("content-length", str(value))


def announced(*headers: Header) -> int:
    return BodyReader(max_bytes=MOST, timeout_s=1).announced_bytes(Client().request(*headers))


# ------------------------------------------------------------------- headers


@pytest.mark.parametrize(
    "kind",
    ["application/json", "Application/JSON", "application/json; charset=utf-8", "application/json ;charset=latin-1"],
)
def test_json_is_taken_whatever_its_charset_is_called(kind: str) -> None:
    assert announced(("content-type", kind), length(7)) == 7


@pytest.mark.parametrize(
    "kinds",
    [
        [],
        [""],
        ["text/plain"],
        ["application/x-www-form-urlencoded"],
        ["multipart/form-data; boundary=application/json"],
        ["application/jsonp"],
        ["application/json, text/plain"],
        ["text/plain; application/json"],
        ["application/json", "text/plain"],
        ["text/plain", "application/json"],
    ],
)
def test_any_other_content_is_a_415(kinds: list[str]) -> None:
    error = refused(lambda: announced(*(("content-type", kind) for kind in kinds)))
    assert (error.status, error.code) == (415, "not_json")
    assert "Content-Type" in error.message
    assert "must be application/json" in error.message


def test_a_long_content_type_is_not_echoed_whole() -> None:
    assert len(refused(lambda: announced(("content-type", "x" * 60_000))).message) < 150


def test_the_same_content_type_twice_says_one_thing() -> None:
    assert announced(JSON, ("content-type", "application/json; charset=utf-8"), length(3)) == 3


def test_without_a_length_a_body_may_be_the_longest() -> None:
    assert announced(JSON) == MOST


def test_a_length_beside_chunks_does_not_count() -> None:
    """Servers go by the chunks; a share of memory by the length would be too small."""
    assert announced(JSON, length(1), ("transfer-encoding", "chunked")) == MOST


@pytest.mark.parametrize("text", ["", "-1", "+1", "1.0", "1e3", "0x10", "5, 5", "five", "²", "9" * 21, "1_000"])
def test_a_length_that_is_no_number_is_a_400(text: str) -> None:
    error = refused(lambda: announced(JSON, length(text)))
    assert error.status == 400
    assert error.message.startswith("Content-Length = ")


# ---------------------------------------------------------------------- read


@pytest.mark.parametrize("headers", [(), (length(26),)])
def test_parts_are_one_body(headers: tuple[Header, ...]) -> None:
    client = Client(*parts(b'{"a": [1,', b"", b' 2.5], "b": "', "é".encode()[:1], "é".encode()[1:] + b'"}'))
    assert read(client, *headers) == {"a": [1, 2.5], "b": "é"}


def test_the_longest_body_is_read_and_one_byte_more_is_not() -> None:
    longest = b'{"a":"' + b"x" * (MOST - 8) + b'"}'
    assert len(read(Client(part(longest)))["a"]) == MOST - 8
    for bodies in ([longest + b" "], [longest, b" "], [b"x"] * (MOST + 1)):
        error = refused(lambda bodies=bodies: read(Client(*parts(*bodies))))
        assert (error.status, error.code) == (413, "body_too_large")
        assert f"{MOST} bytes" in error.message


def test_a_long_body_is_read_to_its_end_before_it_is_refused() -> None:
    """Else its sender, who is still sending, gets a reset in place of the answer."""
    for headers in ((), (length(MOST * 9),)):
        client = Client(*parts(*[b"x" * MOST] * 9))
        assert refused(lambda client=client, headers=headers: read(client, *headers)).status == 413
        assert not client.unread


def test_nothing_is_waited_for_after_the_last_part() -> None:
    began = time.monotonic()
    assert refused(lambda: read(Client(part(b"x" * MOST, more=True), part(b"x")))).status == 413
    assert time.monotonic() - began < 1


def test_a_long_body_ends_when_its_sender_leaves_pauses_or_goes_on_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "_LINGER_S", 0.05)
    monkeypatch.setattr(body, "_LINGER_BYTES", 10 * MOST)

    def left() -> Client:
        client = Client(part(b"x" * 200, more=True))
        client.leave()
        return client

    def endless() -> Client:
        client = Client(part(b"x" * 200, more=True))
        client.receive = lambda: asyncio.sleep(0, part(b"x" * MOST, more=True))  # type: ignore[method-assign]
        return client

    for client in (left(), Client(part(b"x" * 200, more=True)), endless()):
        assert refused(lambda client=client: read(client)).status == 413


def test_a_body_that_is_too_long_and_slow_is_too_long() -> None:
    client = Client(*parts(b"x" * 200, *[b"x"] * 10), pause_s=0.01)
    assert refused(lambda: read(client, timeout_s=0.05)).status == 413
    assert not client.unread


def test_a_body_longer_than_its_length_is_refused() -> None:
    """Memory was set aside for the length."""
    error = refused(lambda: read(Client(*parts(b'{"a":', b' "x"}')), length(6)))
    assert (error.status, error.message) == (400, "the body is longer than its Content-Length = 6")


def test_a_sender_that_stops_or_drips_is_a_408() -> None:
    dripping = Client(*(part(b" ", more=True) for _ in range(50)), pause_s=0.01)
    for client in (Client(part(b"{", more=True)), Client(), dripping):
        error = refused(lambda client=client: read(client, timeout_s=0.05))
        assert (error.status, error.code) == (408, "body_timeout")
        assert "0.05 s" in error.message
    assert dripping.unread


def test_a_sender_that_leaves_is_told_of() -> None:
    client = Client(part(b'{"a": 1}', more=True))
    client.leave()
    with pytest.raises(ClientDisconnect):
        read(client)


# --------------------------------------------------------------------- parse

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_an_object_comes_through_as_it_was(value: dict[str, Any]) -> None:
    assert parse_object(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "line 1, column 1"),
        (b"{", "line 1, column 2"),
        (b'{\n "a": tru}', "line 2, column 7"),
        (b'{"a": 1} {"b": 2}', "line 1, column 10"),
        (b"{'a': 1}", "line 1, column 2"),
        (b'{"a": 1,}', "line 1, column"),
        (b'{"a": "\n"}', "line 1, column"),
        (b'{"a": 01}', "line 1, column"),
        (b"\xef\xbb\xbf{}", "line 1, column 1"),
        (b'{"a": "\xff"}', "it is not UTF-8"),
        ('{"a": "é"}'.encode("latin-1"), "it is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "it is not UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "it is not UTF-8"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": [Infinity]}', "Infinity is no JSON number"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": 1e999}', "'1e999' is too large a number"),
        (b'{"a": -1' + b"0" * 400 + b".5}", "is too large a number"),
        (b'{"a": ' + b"1" * 5000 + b"}", "a number of too many digits"),
        (b'{"a":' * 50_000 + b"1", "it is nested too deeply"),
        (b"[" * 90_000, "it is nested too deeply"),
    ],
)
def test_what_is_no_json_is_told_where(data: bytes, cause: str) -> None:
    error = refused(lambda: parse_object(data))
    assert (error.status, error.code) == (400, "malformed_json")
    assert error.message.startswith("the body is not JSON: ")
    assert cause in error.message
    assert len(error.message) < 150


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"[]", "a list"),
        (b'"{}"', "a string"),
        (b"5", "a number"),
        (b"5.5", "a number"),
        (b"true", "a truth value"),
        (b"null", "null"),
    ],
)
def test_json_that_is_no_object_is_told_what_it_is(data: bytes, name: str) -> None:
    error = refused(lambda: parse_object(data))
    assert (error.status, error.code) == (400, "not_an_object")
    assert error.message == f"the body is {name}: must be a JSON object"


def test_large_whole_numbers_are_kept() -> None:
    assert parse_object(b'{"seed": 123456789012345678901234567890, "t": 1e308}') == {
        "seed": 123456789012345678901234567890,
        "t": 1e308,
    }


def test_values_are_counted_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "_MOST_LISTS_AND_OBJECTS", 10)
    monkeypatch.setattr(body, "_MOST_VALUES", 20)
    assert len(parse_object(b'{"a": [' + b"[]," * 7 + b"{}]}")["a"]) == 8
    assert len(parse_object(b'{"a": [' + b"1," * 20 + b"1]}")["a"]) == 21
    for inner in itertools.chain((b"[]," * 8 + b"[]", b"{}," * 9 + b"{}", b"[" * 20), (b"1," * 21 + b"1", b'"",' * 30)):
        error = refused(lambda inner=inner: parse_object(b'{"a": [' + inner + b"]}"))
        assert (error.status, error.code) == (400, "too_many_values")


def test_a_body_of_very_many_values_does_not_hold_the_event_loop() -> None:
    began = time.process_time()
    for inner in (b"[],", b"{},", b"1,", b'"",'):
        assert refused(lambda inner=inner: parse_object(b'{"a":[' + inner * 3_000_000)).code == "too_many_values"
    assert time.process_time() - began < 0.5
