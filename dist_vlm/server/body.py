"""A request's body: read within its limits, then parsed as strict JSON."""

from __future__ import annotations

import asyncio
import json
import math
import re
from contextlib import suppress
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from dist_vlm.server.errors import ApiError

# What is read and thrown away of a body that is too long, so that its sender gets to read why.
_LINGER_BYTES = 256 << 20
_LINGER_S = 10.0
_LENGTH = re.compile(r"[0-9]{1,20}")
# What takes three bytes of a body may take twenty times as many once it is parsed, and its time in the event loop.
_MOST_LISTS_AND_OBJECTS = 100_000
_MOST_VALUES = 1_000_000


class BodyReader:
    """max_bytes: longest body. timeout_s: how long a client may take to send it."""

    def __init__(self, *, max_bytes: int, timeout_s: float) -> None:
        self.max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()

    def announced_bytes(self, request: Request) -> int:
        """How long the body is, as its header says, else how long it may be. Raises a 400 for a header that is no
        number, a 415 for a content that is not JSON."""
        kinds = request.headers.getlist("content-type")
        if {kind.partition(";")[0].strip().lower() for kind in kinds} != {"application/json"}:
            # Also what keeps other sites' pages from calling a server of the visitor's machine unasked.
            raise ApiError(415, f"Content-Type = {_short(', '.join(kinds))}: must be application/json", code="not_json")
        length = request.headers.get("content-length")
        # A body in chunks is as long as its chunks, whatever length is announced beside them.
        if length is None or "transfer-encoding" in request.headers:
            return self.max_bytes
        if not _LENGTH.fullmatch(length):
            raise ApiError(400, f"Content-Length = {_short(length)}: must be a number of bytes")
        return int(length)

    async def read(self, request: Request) -> dict[str, Any]:
        """Raises `ApiError`: 413 for a body that is too long, 408 for a sender that is too slow, 400 for no JSON, and
        `ClientDisconnect` for one that leaves."""
        announced = self.announced_bytes(request)
        try:
            if announced > self.max_bytes:
                raise _TooLongError(has_more=True)
            async with asyncio.timeout(self._timeout_s):
                data = await _read(request, most=announced)
        except TimeoutError:
            raise ApiError(408, f"the body was not sent within {self._timeout_s:g} s", code="body_timeout") from None
        except _TooLongError as error:
            if error.has_more:
                await _linger(request)
            if announced < self.max_bytes:
                raise ApiError(400, f"the body is longer than its Content-Length = {announced}") from None
            text = f"the body is longer than {self.max_bytes} bytes, the most allowed"
            raise ApiError(413, text, code="body_too_large") from None
        # One at a time, and a turn for everything else after it: bodies that come together would add up to a pause.
        async with self._turn:
            value = parse_object(data)
            await asyncio.sleep(0)
        return value


class _TooLongError(Exception):
    """has_more: whether its sender has not sent all of it."""

    def __init__(self, *, has_more: bool) -> None:
        super().__init__()
        self.has_more = has_more


async def _read(request: Request, *, most: int) -> bytes:
    """Not by `Request.stream`, which does not tell whether a part is the last."""
    parts: list[bytes] = []
    size, has_more = 0, True
    while has_more:
        part, has_more = await _next_part(request)
        size += len(part)
        if size > most:
            raise _TooLongError(has_more=has_more)
        parts.append(part)
    return b"".join(parts)


async def _linger(request: Request) -> None:
    left, has_more = _LINGER_BYTES, True
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(_LINGER_S):
            while has_more and left > 0:
                part, has_more = await _next_part(request)
                left -= max(1, len(part))


async def _next_part(request: Request) -> tuple[bytes, bool]:
    """A part of a body, and whether there is another one after it. Raises `ClientDisconnect`."""
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("body", b""), message.get("more_body", False)


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises a 400 saying what it is instead."""
    _check_counts(data)
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError:
        raise _malformed("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise _malformed(f"line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _malformed("it is nested too deeply") from None
    except ValueError as error:
        cause = str(error) if isinstance(error, _NumberError) else "it has a number of too many digits"
        raise _malformed(cause) from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is {_named(value)}: must be a JSON object", code="not_an_object")
    return value


def _check_counts(data: bytes) -> None:
    """By the marks that come with values, those in texts too: no prompt that a model takes has so many."""
    if data.count(b"[") + data.count(b"{") > _MOST_LISTS_AND_OBJECTS:
        what, most = "lists and objects", _MOST_LISTS_AND_OBJECTS
    elif data.count(b",") > _MOST_VALUES:
        what, most = "values", _MOST_VALUES
    else:
        return
    raise ApiError(400, f"the body has too many {what}: at most {most} are read", code="too_many_values")


class _NumberError(ValueError):
    pass


def _refuse_constant(name: str) -> NoReturn:
    raise _NumberError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _NumberError(f"{_short(text)} is too large a number")
    return number


def _malformed(cause: str) -> ApiError:
    return ApiError(400, f"the body is not JSON: {cause}", code="malformed_json")


def _named(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
