from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dist_vlm.config import ConfigError
from dist_vlm.config_server import ServerConfig
from dist_vlm.launch.remote_media import RemoteMedia, is_remote

LOOPBACK = ServerConfig(allowed_media_networks=("127.0.0.0/8",), image_fetch_timeout_s=5.0)


class CountingHost:
    """Answers each request after a while, and counts those that it has at once, by their Host."""

    def __init__(self, pause_s: float = 0.05) -> None:
        self.pause_s = pause_s
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.num_answered = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        host = next(line.split()[1] for line in head.splitlines() if line.lower().startswith("host:"))
        for name in (host, "all"):
            self.now[name] += 1
            self.most[name] = max(self.most[name], self.now[name])
        try:
            await asyncio.sleep(self.pause_s)
            body = head.split()[1].encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()
            self.num_answered += 1
        finally:
            for name in (host, "all"):
                self.now[name] -= 1
            writer.close()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self.answer, "0.0.0.0", 0)
        async with server:
            yield server.sockets[0].getsockname()[1]


async def fetch(remote: RemoteMedia, url: str) -> bytes:
    async with remote.fetched(url) as data:
        return data


def test_pictures_are_fetched_beside_each_other_within_the_limits() -> None:
    """Each host gets at most 16 at once, all hosts 64 together."""
    host = CountingHost()

    async def run() -> None:
        remote = RemoteMedia(dataclasses.replace(LOOPBACK, max_image_mib=8))
        async with host.serving() as port:
            urls = [f"http://127.0.0.{1 + index % 5}:{port}/{index}" for index in range(150)]
            assert await asyncio.gather(*(fetch(remote, url) for url in urls)) == [
                f"/{index}".encode() for index in range(150)
            ]
            await remote.close()

    asyncio.run(run())
    assert host.most["all"] == 64
    assert max(count for name, count in host.most.items() if name != "all") <= 16


def test_files_under_way_are_bounded_by_their_size() -> None:
    host = CountingHost()

    async def run() -> None:
        remote = RemoteMedia(dataclasses.replace(LOOPBACK, max_image_mib=300))
        async with host.serving() as port:
            await asyncio.gather(*(fetch(remote, f"http://127.0.0.1:{port}/{index}") for index in range(12)))
            await remote.close()

    asyncio.run(run())
    assert host.most["all"] == 3


def test_the_time_of_a_picture_begins_with_its_turn() -> None:
    """Eighty pictures of a host that takes 0.5 s for each, sixteen at once: the last ones wait for 2 s."""
    host = CountingHost(pause_s=0.5)

    async def run() -> None:
        remote = RemoteMedia(dataclasses.replace(LOOPBACK, image_fetch_timeout_s=1.9))
        async with host.serving() as port:
            await asyncio.gather(*(fetch(remote, f"http://127.0.0.1:{port}/{index}") for index in range(80)))
            await remote.close()

    asyncio.run(run())
    assert (host.num_answered, host.most["all"]) == (80, 16)


def test_what_is_not_public_is_refused_and_a_file_too_large_too() -> None:
    host = CountingHost(pause_s=0)

    async def run() -> None:
        async with host.serving() as port:
            url = f"http://127.0.0.1:{port}/{'x' * 2000}"
            for server, problem in (
                (ServerConfig(image_fetch_timeout_s=5.0), r"\(not allowed\)$"),
                (dataclasses.replace(LOOPBACK, max_image_mib=0.001), r"at most 1048 bytes are allowed \(too large\)$"),
                (dataclasses.replace(LOOPBACK, allowed_media_hosts=("example.org",)), r"\(not allowed\)$"),
                (dataclasses.replace(LOOPBACK, disable_media_fetch=True), "disable_media_fetch is set"),
            ):
                remote = RemoteMedia(server)
                with pytest.raises(ValueError, match=problem):
                    await fetch(remote, url)
                await remote.close()

    asyncio.run(run())


def test_without_aiohttp_a_url_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "aiohttp" else found(name))
    with pytest.raises(ValueError, match=r"needs aiohttp: pip install 'dist-vlm\[server\]'"):
        asyncio.run(fetch(RemoteMedia(LOOPBACK), "https://example.org/a.png"))


def test_hosts_that_are_none_are_told_before_the_first_picture() -> None:
    with pytest.raises(ConfigError, match="allowed_media_hosts"):
        RemoteMedia(dataclasses.replace(LOOPBACK, allowed_media_hosts=("a b",)))


def test_a_given_up_fetch_leaves_nothing_behind() -> None:
    host = CountingHost(pause_s=60)

    async def run() -> None:
        remote = RemoteMedia(LOOPBACK)
        async with host.serving() as port:
            tasks = [asyncio.create_task(fetch(remote, f"http://127.0.0.1:{port}/{index}")) for index in range(20)]
            while host.now["all"] < 16:
                await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert not remote._hosts
            await remote.close()
            for other in asyncio.all_tasks() - {asyncio.current_task()}:
                other.cancel()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("http://a/b", True), ("HTTPS://a", True), ("https:a", False), ("httpx://a", False), ("a.png", False)],
)
def test_which_names_are_fetched(name: str, expected: bool) -> None:
    assert is_remote(name) == expected
