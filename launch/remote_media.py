"""Pictures that a file of requests names by http(s) URLs."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dist_vlm.config import ConfigError
from dist_vlm.launch.local_media import short

if TYPE_CHECKING:
    from dist_vlm.config_server import ServerConfig
    from dist_vlm.media.fetch import PictureFetcher

FLAGS = ("allowed_media_hosts", "allowed_media_networks", "image_fetch_timeout_s", "max_image_mib")

_MIB = 1 << 20
_MAX_FETCHES = 64
# So many of one host at once; the time that a picture has does not begin before its turn.
_MAX_FETCHES_OF_A_HOST = 16
# Files under way, each counted as the largest that it may be.
_MAX_BYTES = 1 << 30


class RemoteMedia:
    """Fetches pictures beside each other, as the server does. Used in one event loop, closed by its owner.

    What it fetches at once is bounded, in all and of one host. In a batch over several replicas each task that prepares
    pictures has one of its own, so a host may see the bound times the number of tasks that run beside each other.

    server: the section as it is resolved; the fields of `FLAGS` and `disable_media_fetch` count.
    """

    def __init__(self, server: ServerConfig) -> None:
        """Raises `ConfigError` for hosts that are none."""
        assert server.image_fetch_timeout_s is not None, "resolved_server() decides it"
        self._server = server
        self._max_bytes = int(server.max_image_mib * _MIB)
        self._places = asyncio.Semaphore(max(1, min(_MAX_FETCHES, _MAX_BYTES // self._max_bytes)))
        self._hosts: dict[str, asyncio.Semaphore] = {}
        self._users: Counter[str] = Counter()
        self._fetcher: PictureFetcher | None = None
        if server.allowed_media_hosts is not None and not server.disable_media_fetch and _can_fetch():
            self._open()

    @asynccontextmanager
    async def fetched(self, url: str) -> AsyncIterator[bytes]:
        """A picture's file, which counts as under way as long as this is open. Raises `ValueError` with the cause."""
        name = short(url)
        if self._server.disable_media_fetch:
            raise ValueError(f"{name}: disable_media_fetch is set; give a file or a data: URL")
        if not _can_fetch():
            raise ValueError(f"{name}: fetching pictures needs aiohttp: pip install 'dist-vlm[server]'")
        fetcher = self._fetcher or self._open()
        from dist_vlm.media.fetch import FetchError

        async with self._host(url), self._places:
            try:
                data = await fetcher.fetch(url, name=name)
            except FetchError as error:
                raise ValueError(f"{error} ({error.code.replace('_', ' ')})") from None
            yield data

    async def close(self) -> None:
        if self._fetcher is not None:
            await self._fetcher.close()

    def _open(self) -> PictureFetcher:
        fetcher_class: Any = importlib.import_module("dist_vlm.media.fetch").PictureFetcher
        hosts = self._server.allowed_media_hosts
        try:
            self._fetcher = fetcher_class(
                timeout_s=self._server.image_fetch_timeout_s,
                max_bytes=self._max_bytes,
                allowed_hosts=hosts,
                allowed_networks=self._server.allowed_media_networks,
            )
        except ValueError as error:
            raise ConfigError(str(error), field="server.allowed_media_hosts", value=hosts) from None
        return self._fetcher

    @asynccontextmanager
    async def _host(self, url: str) -> AsyncIterator[None]:
        """A place among the fetches from the URL's host."""
        host = _host_of(url)
        self._users[host] += 1
        try:
            async with self._hosts.setdefault(host, asyncio.Semaphore(_MAX_FETCHES_OF_A_HOST)):
                yield
        finally:
            self._users[host] -= 1
            if not self._users[host]:
                del self._users[host], self._hosts[host]


def is_remote(name: str) -> bool:
    return name[:8].lower().startswith(("http://", "https://"))


def _can_fetch() -> bool:
    return importlib.util.find_spec("aiohttp") is not None


def _host_of(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""
