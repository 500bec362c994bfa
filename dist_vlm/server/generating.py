"""Serves a generating request: its body in, its answer out, whole or as a stream of events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from dist_vlm.outputs import RequestOutput
from dist_vlm.server.admission import Seat
from dist_vlm.server.errors import ApiError, api_error
from dist_vlm.server.event_stream import DONE, ClientGoneError, EventStream, event, unless_gone
from dist_vlm.server.exchange import Exchange
from dist_vlm.server.services import Services


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """What a body's reader needs beside the body.

    seat: to be grown to the number of answers. held: what is given back when the request has ended.
    request_id: as logged. time: `time.time()`.
    """

    services: Services
    seat: Seat
    held: AsyncExitStack
    request_id: str
    time: float


# Makes an exchange of a body. Raises `ApiError` or `ValueError`.
Reader = Callable[[dict[str, Any], Arrival], Coroutine[Any, Any, Exchange]]


async def generate(request: Request, services: Services, reader: Reader) -> Response:
    """Raises `ApiError`, and `ClientGoneError` if nobody waits for the answer any more."""
    async with AsyncExitStack() as held:
        seat = held.enter_context(services.admission.enter())
        request_id: str = request.state.request_id
        arrival = Arrival(services=services, seat=seat, held=held, request_id=request_id, time=time.time())
        exchange = await _read(request, arrival, reader)
        outputs = exchange.outputs()
        held.push_async_callback(outputs.aclose)
        if not exchange.streams:
            return JSONResponse(await unless_gone(request, exchange.answer(outputs)))
        # Awaited before the response begins, so that a request which the engine refuses gets its own status.
        first = await unless_gone(request, anext(outputs))
        return EventStream(_events(exchange, first, outputs), held.pop_all())


@asynccontextmanager
async def body_of(request: Request, services: Services) -> AsyncIterator[dict[str, Any]]:
    """A request's JSON object, in its share of the memory for bodies."""
    announced = services.body_reader.announced_bytes(request)
    async with services.bodies.share(min(announced, services.body_reader.max_bytes)):
        try:
            body = await services.body_reader.read(request)
        except ClientDisconnect:
            raise ClientGoneError from None
        yield body


async def checked(reading: Awaitable[Any]) -> Any:
    """What is read, with a value that is refused as an error of the request."""
    try:
        return await reading
    except ValueError as error:
        raise api_error(error) from error


async def _read(request: Request, arrival: Arrival, reader: Reader) -> Exchange:
    async with body_of(request, arrival.services) as body:
        exchange: Exchange = await unless_gone(request, checked(reader(body, arrival)))
        return exchange


async def _events(
    exchange: Exchange, first: tuple[int, RequestOutput], outputs: AsyncGenerator[tuple[int, RequestOutput], None]
) -> AsyncGenerator[bytes, None]:
    """A stream's events. An error that comes once it has begun is an event too: the status is long sent."""
    finished: dict[int, RequestOutput] = {}
    async with aclosing(outputs):
        try:
            for chunk in exchange.first_chunks():
                yield event(chunk)
            async for index, output in _again(first, outputs):
                for chunk in exchange.new_chunks(index, output):
                    yield event(chunk)
                if output.finished:
                    finished[index] = output
            if exchange.tells_usage:
                yield event(exchange.usage_chunk([finished[index] for index in sorted(finished)]))
        except ApiError as error:
            yield event(error.body)
    yield DONE


async def _again(
    first: tuple[int, RequestOutput], rest: AsyncGenerator[tuple[int, RequestOutput], None]
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    yield first
    async for item in rest:
        yield item
