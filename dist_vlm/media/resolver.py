"""Names to addresses: looked up once for a connection, all of them checked, and none but those connected to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv6Address, ip_address

from aiohttp.abc import AbstractResolver, ResolveResult

from dist_vlm.media.addresses import AllowedAddresses
from dist_vlm.media.fetch_error import FetchError, cut

_log = logging.getLogger(__name__)

Resolve = Callable[[str], Awaitable[Sequence[str]]]
"""A name to its addresses as text; raises `OSError` if it has none."""


class SystemResolver:
    """`getaddrinfo` in threads of its own.

    A look-up cannot be broken off. In the event loop's threads, a few names whose servers do not answer would stop
    all else that runs there, and an interpreter that ends would wait for them; these threads it does not wait for.
    """

    def __init__(self, *, max_lookups: int = 64) -> None:
        self._places = asyncio.Semaphore(max_lookups)

    async def __call__(self, host: str) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Sequence[str]] = loop.create_future()

        def deliver(addresses: Sequence[str], error: OSError | None) -> None:
            self._places.release()
            if answer.done():
                return
            if error is None:
                answer.set_result(addresses)
            else:
                answer.set_exception(error)

        def look_up() -> None:
            addresses, error = _look_up(host)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(deliver, addresses, error)

        await self._places.acquire()
        try:
            threading.Thread(target=look_up, name="look-up", daemon=True).start()
        except RuntimeError as error:  # no more threads
            self._places.release()
            raise OSError(socket.EAI_AGAIN, "no thread for a look-up") from error
        return await answer


def _look_up(host: str) -> tuple[Sequence[str], OSError | None]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    except UnicodeError:
        return (), socket.gaierror(socket.EAI_NONAME, "not a name")
    except OSError as error:
        return (), error
    return [str(address[0]) for *_, address in found], None


class CheckedResolver(AbstractResolver):
    """What the connector asks for addresses: it gets those of `resolve`, if all of them are allowed."""

    def __init__(self, resolve: Resolve, *, addresses: AllowedAddresses) -> None:
        self._resolve = resolve
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Raises `FetchError`: dns, or not_allowed if one address of `host` is."""
        try:
            found = [ip_address(address) for address in await self._resolve(host)]
        except OSError as error:
            _log.debug("no address of %s", host, exc_info=True)
            is_passing = error.errno == socket.EAI_AGAIN
            problem = f"DNS does not answer for {cut(host)}" if is_passing else f"DNS knows no host {cut(host)}"
            raise FetchError(problem, code="dns", is_passing=is_passing) from None
        if not found:
            raise FetchError(f"DNS knows no address of {cut(host)}", code="dns")
        # One that is not allowed spoils them all: a public name with a private address beside its public ones is
        # an attack, or a mistake that would fail now and then.
        refused = [address for address in found if not self._addresses.allows(address)]
        if refused:
            _log.debug("%s has the addresses %s, of which %s are refused", host, found, refused)
            raise FetchError(f"{cut(host)} has an address that is neither public nor allowed here", code="not_allowed")
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET6 if isinstance(address, IPv6Address) else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in found
        ]

    async def close(self) -> None:
        """Nothing to close: look-ups end by themselves."""
