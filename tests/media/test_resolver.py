from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest

from dist_vlm.media import resolver
from dist_vlm.media.addresses import AllowedAddresses
from dist_vlm.media.fetch_error import FetchError
from dist_vlm.media.resolver import CheckedResolver, SystemResolver


def answering(answer):
    async def resolve(host):
        if isinstance(answer, Exception):
            raise answer
        return answer

    return resolve


def looked_up(answer, networks=()):
    checked = CheckedResolver(answering(answer), addresses=AllowedAddresses(networks))
    return asyncio.run(checked.resolve("some.example", 81))


def test_the_connector_gets_the_addresses_that_were_checked():
    found = looked_up(["8.8.8.8", "2606:4700::1111"])
    assert [(one["host"], one["port"], one["family"]) for one in found] == [
        ("8.8.8.8", 81, socket.AF_INET),
        ("2606:4700::1111", 81, socket.AF_INET6),
    ]
    assert all(one["flags"] & socket.AI_NUMERICHOST for one in found)


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["10.0.0.1", "8.8.8.8"], ["8.8.8.8", "::1"], ["::ffff:169.254.169.254"]],
)
def test_one_address_that_is_not_allowed_spoils_all(addresses):
    with pytest.raises(FetchError, match="some.example has an address that is neither public nor allowed") as caught:
        looked_up(addresses)
    assert caught.value.code == "not_allowed"
    assert not any(address in str(caught.value) for address in addresses)  # nobody learns what a name means in here
    assert len(looked_up(addresses, networks=["0.0.0.0/0", "::/0"])) == len(addresses)


@pytest.mark.parametrize(
    ("answer", "message", "is_passing"),
    [
        ([], "no address of some.example", False),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "no host some.example", False),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), "does not answer for some.example", True),
    ],
)
def test_a_name_without_addresses(answer, message, is_passing):
    with pytest.raises(FetchError, match=message) as caught:
        looked_up(answer)
    assert (caught.value.code, caught.value.is_passing) == ("dns", is_passing)
    assert "failure" not in str(caught.value)


def test_the_system_knows_localhost():
    assert "127.0.0.1" in asyncio.run(SystemResolver()("localhost"))


def test_what_is_no_name_has_no_address():
    with pytest.raises(OSError, match="not a name"):
        asyncio.run(SystemResolver()("a" * 70 + ".é"))


def test_slow_lookups_stop_neither_the_loop_nor_its_threads_nor_each_other(monkeypatch):
    """Two places, three slow names: the third waits for a place, all else goes on, and a look-up can be left."""
    release, running = threading.Event(), []

    def slow(host, *_, **__):
        running.append(host)
        assert release.wait(10)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"9.9.9.{len(host)}", 0))]

    async def story():
        resolve = SystemResolver(max_lookups=2)
        tasks = [asyncio.ensure_future(resolve(name)) for name in ("a", "bb", "ccc")]
        while len(running) < 2:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.02)
        assert sorted(running) == ["a", "bb"]
        assert await asyncio.to_thread(lambda: 5) == 5
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        assert sorted(running) == ["a", "bb"]  # left, not ended: its place is not free yet
        release.set()
        return [await task for task in tasks[1:]]

    monkeypatch.setattr(resolver.socket, "getaddrinfo", slow)
    assert asyncio.run(asyncio.wait_for(story(), 10)) == [["9.9.9.2"], ["9.9.9.3"]]


def test_a_loop_that_ends_does_not_wait_for_a_lookup(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(resolver.socket, "getaddrinfo", lambda *_, **__: release.wait(10) and [])

    async def leave():
        async with asyncio.timeout(0.05):
            await SystemResolver()("slow.example")

    started = time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(leave())
    assert time.monotonic() - started < 2
    threads = [thread for thread in threading.enumerate() if thread.name == "look-up"]
    assert threads and all(thread.daemon for thread in threads)
    release.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
