"""Fetches pictures from URLs that clients supplied, within limits of time, size and reach."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Sequence
from typing import Any

import aiohttp
from yarl import URL

from dist_vlm.media.addresses import AllowedAddresses
from dist_vlm.media.fetch_error import FetchError, library_faults, shown
from dist_vlm.media.picture_url import PictureUrls
from dist_vlm.media.resolver import CheckedResolver, Resolve, SystemResolver
from dist_vlm.version import __version__

__all__ = ["FetchError", "PictureFetcher"]

_log = logging.getLogger(__name__)

_REDIRECTS = (301, 302, 303, 307, 308)
_PASSING = (429, 502, 503, 504)
_PAUSES_S = (0.1, 0.3)  # before the second try and the third, which is the last
_NO_IMAGES = ("application/json", "image/svg+xml")
_MAX_CONNECTIONS = 64
_MAX_CONNECTIONS_OF_A_HOST = 16
_HEADERS = {
    "User-Agent": f"dist-vlm/{__version__}",
    "Accept": "image/jpeg, image/png, image/webp, image/*;q=0.5, */*;q=0.1",
    "Accept-Encoding": "identity",
}


class PictureFetcher:
    """Fetches pictures over http and https, each within one deadline; used in one event loop, closed by its owner.

    A name is looked up once for each connection, and only addresses that were checked are connected to: a name that
    points elsewhere a moment later gains nothing. Proxies of the environment are not used, cookies not kept.
    Authorities are the system's, or those of SSL_CERT_FILE and SSL_CERT_DIR.
    """

    def __init__(
        self,
        *,
        timeout_s: float,
        max_bytes: int,
        allowed_hosts: Sequence[str] | None = None,
        allowed_networks: Sequence[str] = (),
        max_redirects: int = 5,
        resolve: Resolve | None = None,
    ) -> None:
        """timeout_s: seconds for a picture, from the look-up of its host to its last byte, all tries included.
        max_bytes: size of a picture's file.
        allowed_hosts: the only hosts to fetch from, "*.example.org" for all below it; None for any.
        allowed_networks: networks to fetch from though they are not public.
        max_redirects: redirects to follow for a picture.
        resolve: names to addresses (None: as the system does it).

        Raises `ValueError` for a host or network that is none, and for limits out of range.
        """
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s!r}: must be above 0")
        if max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes!r}: must be at least 1")
        if max_redirects < 0:
            raise ValueError(f"max_redirects={max_redirects!r}: must be at least 0")
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._max_redirects = max_redirects
        self._addresses = AllowedAddresses(allowed_networks)
        self._urls = PictureUrls(hosts=allowed_hosts, addresses=self._addresses)
        self._resolve = resolve if resolve is not None else SystemResolver()
        self._tls = ssl.create_default_context()  # reads files, so not in the event loop
        self._tls.set_alpn_protocols(["http/1.1"])
        self._session: aiohttp.ClientSession | None = None
        self._is_closed = False

    async def fetch(self, url: str, *, name: str) -> bytes:
        """The bytes that `url` leads to; that they are a picture is for the decoder to say.

        name: what messages call the picture, as "messages[0].content[1].image_url.url".
        Raises `FetchError`. Broken off, it closes its connection.
        """
        try:
            return await self._fetch_in_time(self._urls.check(url))
        except FetchError as error:
            _log.debug("%s: %s (%s)", name, error.problem, error.code)
            raise error.called(name) from None

    async def close(self) -> None:
        """Closes all connections; fetches under way fail."""
        self._is_closed = True
        if self._session is not None:
            await self._session.close()

    async def _fetch_in_time(self, url: URL) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                return await self._fetch_with_retries(url, deadline=limit.when() or 0.0)
        except TimeoutError:
            problem = f"fetching it from {shown(url)} timed out; the timeout is {self._timeout_s:g} s"
            raise FetchError(problem, code="timeout") from None

    async def _fetch_with_retries(self, url: URL, *, deadline: float) -> bytes:
        clock = asyncio.get_running_loop().time
        for pause_s in _PAUSES_S:
            try:
                return await self._follow(url)
            except FetchError as error:
                if not error.is_passing or clock() + pause_s >= deadline:
                    raise
                _log.debug("%s; tried again in %g s", error.problem, pause_s)
            await asyncio.sleep(pause_s)
        return await self._follow(url)

    async def _follow(self, url: URL) -> bytes:
        """One try: `url` and where it redirects to."""
        for _ in range(self._max_redirects + 1):
            with library_faults(url):
                response = await self._open_session().get(url, allow_redirects=False)
                try:
                    if response.status not in _REDIRECTS:
                        return await self._body(response, url)
                finally:
                    response.close()  # with its connection, wherever the answer was left
            if "Location" not in response.headers:
                raise FetchError(f"{shown(url)} redirects without saying where to", code="redirects")
            url = self._urls.check_redirect(url, response.headers["Location"])
        raise FetchError(f"more than {self._max_redirects} redirects, the last to {shown(url)}", code="redirects")

    async def _body(self, response: aiohttp.ClientResponse, url: URL) -> bytes:
        _check_is_picture(response, shown(url))
        if (response.content_length or 0) > self._max_bytes:
            raise self._too_large(f"is {response.content_length} bytes large")
        data = bytearray()
        async for part in response.content.iter_any():
            data += part
            if len(data) > self._max_bytes:
                raise self._too_large("is too large")
        return bytes(data)

    def _too_large(self, what: str) -> FetchError:
        return FetchError(f"the file {what}; at most {self._max_bytes} bytes are allowed", code="too_large")

    def _open_session(self) -> aiohttp.ClientSession:
        if self._is_closed:
            raise FetchError("pictures are not fetched any more, the server is going down", code="refused")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=_MAX_CONNECTIONS,
                    limit_per_host=_MAX_CONNECTIONS_OF_A_HOST,
                    resolver=CheckedResolver(self._resolve, addresses=self._addresses),
                    use_dns_cache=False,
                    # A connection for each picture: what a server sends late on one that is kept would be taken
                    # for the answer to somebody else's request.
                    force_close=True,
                    socket_factory=self._socket,
                    ssl=self._tls,
                ),
                headers=_HEADERS,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
                auto_decompress=False,
                trust_env=False,
                middlewares=(_without_second_try,),
            )
        return self._session

    def _socket(self, info: tuple[Any, ...]) -> socket.socket:
        """The socket for an address that the connector is about to connect to: the last check, literals included."""
        family, kind, protocol, _, address = info
        if not self._addresses.allows(address[0]):
            raise PermissionError(f"{address[0]} was not checked")
        return socket.socket(family, kind, protocol)


async def _without_second_try(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """The library asks once more by itself after errors of its own; after ours it does not, so tries are counted."""
    with library_faults(request.url):
        return await handler(request)


def _check_is_picture(response: aiohttp.ClientResponse, where: str) -> None:
    """Raises `FetchError` for an answer whose head says that no picture follows."""
    if response.status != 200:
        problem = f"{where} answers with the status {response.status}"
        raise FetchError(problem, code="status", is_passing=response.status in _PASSING)
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind.startswith("text/") or kind in _NO_IMAGES:
        known = kind if kind in ("text/html", "text/plain", *_NO_IMAGES) else "text"
        raise FetchError(f"{where} answers with {known}, not with a picture", code="not_an_image")
    # Nothing is unpacked here: a few bytes could become any number.
    if response.headers.get("Content-Encoding", "").strip().lower() not in ("", "identity"):
        raise FetchError(f"{where} answers with a compressed file, not with a picture", code="not_an_image")
