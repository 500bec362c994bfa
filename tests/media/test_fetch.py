"""Every connection that a test makes passes `WatchedLoop`: it writes down where to, and lets none leave the machine."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import socket
import ssl
import subprocess
import time
from collections import Counter

import pytest

import dist_vlm
from dist_vlm.media import PictureError
from dist_vlm.media.fetch import FetchError, PictureFetcher

DATA = os.urandom(100_000)
NAME = "messages[0].content[1].image_url.url"
PUBLIC = "93.184.216.34"
# Two hosts of the loopback network: SITE stands for what may be fetched from, VICTIM for what may not.
SITE, VICTIM = "127.0.0.2", "127.0.0.1"
SPELLINGS = "127.0.0.1 127.1 0x7f000001 2130706433 0177.0.0.1 [::1] [::ffff:127.0.0.1] [64:ff9b::127.0.0.1]"


@pytest.fixture(autouse=True)
def no_authorities(monkeypatch, tmp_path):
    """The system's certificates take 20 ms to read, and no test needs them."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))


class WatchedLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        super().__init__()
        self.connected_to = []

    async def sock_connect(self, sock, address):
        self.connected_to.append(address[0])
        if not address[0].startswith("127."):
            raise ConnectionRefusedError(address)
        await super().sock_connect(sock, address)


class Web:
    """A server of raw bytes: `answer(path)` gives the bytes to send, or a coroutine function that writes them."""

    def __init__(self, answer):
        self.answer = answer
        self.requests = []
        self.connections = self.open = self.max_open = 0
        self.left = asyncio.Event()  # a client has closed its connection
        self.handlers = set()

    async def serve(self, reader, writer):
        self.handlers.add(asyncio.current_task())
        self.connections += 1
        self.open += 1
        self.max_open = max(self.max_open, self.open)
        watcher = None
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while True:
                    head = (await reader.readuntil(b"\r\n\r\n")).decode()
                    self.requests.append(head)
                    answer = self.answer(head.split()[1])
                    if isinstance(answer, bytes):
                        writer.write(answer)
                        await writer.drain()
                        if b"\r\nConnection: close" in answer:
                            break
                    else:
                        watcher = asyncio.ensure_future(self.watch(reader))
                        await answer(writer)
                        break
        finally:
            self.open -= 1
            writer.close()
            if watcher is not None:
                await asyncio.wait([watcher], timeout=2)
                watcher.cancel()

    async def watch(self, reader):
        with contextlib.suppress(ConnectionError):
            await reader.read()
        self.left.set()


@contextlib.asynccontextmanager
async def web(answer, *, host=SITE, port=0, tls=None):
    site = Web(answer if callable(answer) else lambda path: answer)
    server = await asyncio.start_server(site.serve, host, port, ssl=tls)
    site.port = server.sockets[0].getsockname()[1]
    site.url = f"{'https' if tls else 'http'}://{host}:{site.port}"
    try:
        yield site
    finally:
        server.close()
        for handler in site.handlers:
            handler.cancel()
        await asyncio.gather(*site.handlers, return_exceptions=True)


@contextlib.asynccontextmanager
async def fetching(**options):
    defaults = {"timeout_s": 5.0, "max_bytes": 1_000_000, "allowed_networks": [f"{SITE}/32"]}
    fetcher = PictureFetcher(**{**defaults, **options})
    try:
        yield fetcher
    finally:
        await fetcher.close()


def run(coroutine):
    with asyncio.Runner(loop_factory=WatchedLoop) as runner:
        return runner.run(asyncio.wait_for(coroutine, 20))


def connections():
    return asyncio.get_running_loop().connected_to


async def refused(fetcher, url, code, *words):
    """The message with which `url` is refused."""
    with pytest.raises(FetchError) as caught:
        await fetcher.fetch(url, name=NAME)
    message = str(caught.value)
    assert caught.value.code == code, message
    assert message.startswith(NAME + ": ")
    assert [word for word in words if word not in message] == []
    return message


def ok(body=DATA, *heads, status="200 OK", length=None):
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *heads, "", ""]
    return "\r\n".join(lines).encode() + body


def redirect(target, status="302 Found"):
    return ok(b"", f"Location: {target}", status=status)


def names(**hosts):
    """A resolver: each name's list of answers is given one after the other, the last one for ever."""
    calls = Counter()

    async def resolve(host):
        answers = hosts.get(host.split(".")[0])
        if answers is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        calls[host] += 1
        answer = answers[min(calls[host], len(answers)) - 1]
        return [answer] if isinstance(answer, str) else answer

    resolve.calls = calls
    return resolve


# What is fetched, and how it is asked for


def test_the_bytes_are_those_that_were_sent():
    async def story():
        async with web(ok(DATA, "Content-Type: image/png")) as site, fetching() as fetcher:
            assert await fetcher.fetch(f"{site.url}/a%2Fb?sig=%2F+%7E&x", name=NAME) == DATA
            assert await fetcher.fetch(f"{site.url}/again", name=NAME) == DATA
            return site.requests

    first, again = run(story())
    line, *heads = first.strip().split("\r\n")
    assert line == "GET /a%2Fb?sig=%2F+%7E&x HTTP/1.1"
    assert f"User-Agent: dist-vlm/{dist_vlm.__version__}" in heads
    assert "Accept-Encoding: identity" in heads
    assert [head for head in heads if head.lower().startswith(("cookie", "authorization", "referer"))] == []
    assert again.startswith("GET /again ")


@pytest.mark.parametrize(
    "head",
    ["Content-Type: image/jpeg", "Content-Type: application/octet-stream", "Content-Type: nonsense", "X-None: 1"]
    + ["Content-Encoding: identity"],
)
def test_any_other_type_is_for_the_decoder_to_judge(head):
    async def story():
        async with web(ok(DATA, head)) as site, fetching() as fetcher:
            assert await fetcher.fetch(site.url, name=NAME) == DATA

    run(story())


def test_bodies_in_chunks_and_up_to_the_close():
    chunked = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (DATA[:7], DATA[7:5000], DATA[5000:]))
    answers = {
        "/chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked + b"0\r\n\r\n",
        "/close": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + DATA,
    }

    async def story():
        async with web(answers.get) as site, fetching(max_bytes=len(DATA)) as fetcher:
            for path in answers:
                assert await fetcher.fetch(site.url + path, name=NAME) == DATA

    run(story())


def test_no_cookies_are_kept_and_no_proxy_or_netrc_of_the_environment_is_used(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text(f"machine {SITE} login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, f"http://{VICTIM}:9")

    async def story():
        async with web(ok(DATA, "Set-Cookie: a=b; Path=/")) as site, fetching() as fetcher:
            for _ in range(2):
                assert await fetcher.fetch(site.url, name=NAME) == DATA
            assert set(connections()) == {SITE}
            assert not any("cookie" in head.lower() or "authorization" in head.lower() for head in site.requests)

    run(story())


def test_each_picture_has_a_connection_of_its_own():
    """The first answer is followed by another, late: it must not become the answer to the next request."""

    async def two_answers(writer):
        writer.write(ok(b"first"))
        await asyncio.sleep(0.02)
        writer.write(ok(b"stray"))
        await asyncio.sleep(0.1)

    async def story():
        answers = iter([two_answers, ok(b"second")])
        async with web(lambda path: next(answers)) as site, fetching() as fetcher:
            assert await fetcher.fetch(site.url, name=NAME) == b"first"
            await asyncio.sleep(0.05)
            assert await fetcher.fetch(site.url, name=NAME) == b"second"
            assert site.connections == 2

    run(story())


# Where to


@pytest.mark.parametrize("host", SPELLINGS.split())
def test_loopback_is_not_reached_however_it_is_spelled(host):
    async def story():
        async with web(ok(), host=VICTIM) as victim, fetching() as fetcher:
            await refused(fetcher, f"http://{host}:{victim.port}/", "not_allowed")
            assert connections() == []
            if not host.startswith("["):  # each does lead there, as far as the machine has addresses of that kind
                async with fetching(allowed_networks=["127.0.0.0/8"]) as open_fetcher:
                    assert await open_fetcher.fetch(f"http://{host}:{victim.port}/", name=NAME) == DATA
                assert (victim.connections, connections()) == (1, [VICTIM])

    run(story())


@pytest.mark.parametrize(
    "trick",
    ["http://good.example\\@127.0.0.1:{}/", "http://127.0.0.1:{}#@good.example/", "http://good.example@127.0.0.1:{}/"]
    + ["http://127.0.0.1:{}\\@good.example/", "http://127.0.0.1:{}?@good.example/", "http://[::ffff:127.0.0.1]:{}/"]
    + ["http://good.example:80@127.0.0.1:{}/", "http://127.0.0.1:{}/ http://good.example/", "//127.0.0.1:{}/"],
)
def test_tricks_with_the_host(trick):
    async def story():
        resolve = names(good=[SITE])
        async with web(ok(), host=VICTIM) as victim, fetching(resolve=resolve) as fetcher:
            message = await refused(fetcher, trick.format(victim.port), "not_allowed")
            assert (victim.connections, connections(), resolve.calls) == (0, [], {})
            assert "@" not in message

    run(story())


def test_a_name_is_looked_up_once_and_what_was_checked_is_connected_to():
    """DNS answers with a public address and, a moment later, with that of a host inside: only the first is used."""

    async def story():
        resolve = names(rebind=[PUBLIC, VICTIM])
        async with web(ok(), host=VICTIM) as victim, fetching(resolve=resolve) as fetcher:
            # No connection to the public address, so it is tried again, with a look-up of its own.
            await refused(
                fetcher, f"http://rebind.example:{victim.port}/", "not_allowed", "rebind.example has an address"
            )
            assert connections() == [PUBLIC]
            assert resolve.calls["rebind.example"] == 2
            assert victim.connections == 0

    run(story())


def test_dns_that_changes_between_pictures_and_redirects():
    async def story():
        resolve = names(rebind=[SITE, VICTIM])
        answers = {"/": redirect("/picture"), "/picture": ok()}
        async with web(answers.get) as site, web(ok(), host=VICTIM, port=site.port) as victim:
            async with fetching(resolve=resolve) as fetcher:
                url = f"http://rebind.example:{site.port}/"
                await refused(fetcher, url, "not_allowed", "rebind.example has an address")
                await refused(fetcher, url, "not_allowed", "rebind.example has an address")
            assert (site.connections, victim.connections, connections()) == (1, 0, [SITE])

    run(story())


def test_a_mixed_answer_is_refused_whole():
    async def story():
        resolve = names(mixed=[[SITE, VICTIM]], both=[[SITE, "127.0.0.3"]])
        networks = [f"{SITE}/32", "127.0.0.3/32"]
        async with web(ok()) as site, fetching(resolve=resolve, allowed_networks=networks) as fetcher:
            await refused(fetcher, f"http://mixed.example:{site.port}/", "not_allowed")
            assert (site.connections, connections()) == (0, [])
            assert await fetcher.fetch(f"http://both.example:{site.port}/", name=NAME) == DATA

    run(story())


def test_an_address_that_nobody_checked_gets_no_socket():
    """The last line of defence by itself: the session is handed a literal that the rules for URLs have not seen."""

    async def story():
        async with web(ok(), host=VICTIM) as victim, fetching() as fetcher:
            with pytest.raises(FetchError, match="no connection"):
                await fetcher._open_session().get(victim.url)
            assert (victim.connections, connections()) == (0, [])

    run(story())


def test_only_listed_hosts_are_looked_up():
    async def story():
        resolve = names(a=[SITE], b=[SITE], good=[SITE])
        async with web(ok()) as site, fetching(resolve=resolve, allowed_hosts=["*.good.example"]) as fetcher:
            assert await fetcher.fetch(f"http://A.good.example:{site.port}/", name=NAME) == DATA
            for host in ("good.example", "a.good.example.evil", "b.example", SITE):
                await refused(fetcher, f"http://{host}:{site.port}/", "not_allowed", host, "not among the hosts")
            assert resolve.calls == {"a.good.example": 1}

    run(story())


# Redirects


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirects_are_followed(status):
    answers = {"/a": redirect("b", status), "/b": redirect("//other.example:{port}/c", status), "/c": ok()}

    async def story():
        resolve = names(one=[SITE], other=[SITE])
        async with (
            web(lambda path: answers[path].replace(b"{port}", b"%d" % site.port)) as site,
            fetching(resolve=resolve) as fetcher,
        ):
            assert await fetcher.fetch(f"http://one.example:{site.port}/a", name=NAME) == DATA
        return [(head.split()[1], head.split("Host: ")[1].split(".")[0]) for head in site.requests]

    assert run(story()) == [("/a", "one"), ("/b", "one"), ("/c", "other")]


@pytest.mark.parametrize(
    ("target", "word"),
    [
        ("http://127.0.0.1:{port}/", "127.0.0.1 is an address"),
        ("http://127.1:{port}/", "127.0.0.1 is an address"),
        ("http://169.254.169.254/latest/meta-data/", "169.254.169.254 is an address"),
        ("http://[::ffff:169.254.169.254]/", "neither public"),
        ("http://inside.example:{port}/", "inside.example has an address"),
        ("http://meta.example/", "meta.example has an address"),
        ("//u:secret@site.example:{port}/", "user name"),
        ("//site.example\\@127.0.0.1:{port}/", "backslash"),
        ("file:///etc/passwd", "scheme 'file'"),
        ("ftp://site.example/", "scheme 'ftp'"),
    ],
)
def test_redirects_are_checked_like_the_first_url(target, word):
    async def story():
        resolve = names(site=[SITE], inside=[VICTIM], meta=["169.254.169.254"])
        async with web(ok(), host=VICTIM) as victim, web(redirect(target.format(port=victim.port))) as site:
            async with fetching(resolve=resolve) as fetcher:
                message = await refused(fetcher, f"http://site.example:{site.port}/?token=secret", "not_allowed", word)
            assert (site.connections, victim.connections, connections()) == (1, 0, [SITE])
            assert "secret" not in message

    run(story())


def test_redirects_end():
    async def story():
        async with web(lambda path: redirect("/" + "a" * len(path))) as site:
            async with fetching(max_redirects=3) as fetcher:
                await refused(fetcher, f"{site.url}/", "redirects", "more than 3 redirects")
            assert len(site.requests) == 4
        async with web(redirect("/")) as loop, fetching() as fetcher:
            await refused(fetcher, loop.url, "redirects", "more than 5 redirects")
            assert len(loop.requests) == 6
        async with web(redirect("/")) as none, fetching(max_redirects=0) as fetcher:
            await refused(fetcher, none.url, "redirects", "more than 0 redirects")
            assert len(none.requests) == 1
        async with web(ok(status="302 Found")) as lost, fetching() as fetcher:
            await refused(fetcher, lost.url, "redirects", "without saying where to")

    run(story())


# Time


async def forever(writer):
    await asyncio.sleep(30)


async def hang_up(writer):
    writer.close()


async def drip_head(writer):
    for _ in range(1000):
        writer.write(b"HTTP/1.1 200 OK\r\nX-Slow: " if not _ else b"a")
        await asyncio.sleep(0.01)


async def drip_body(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    for _ in range(1000):
        writer.write(b"a")
        await asyncio.sleep(0.01)


async def more_than_enough(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    for _ in range(1000):
        writer.write(b"a" * 100_000)
        await writer.drain()


@pytest.mark.parametrize("answer", [forever, drip_head, drip_body])
def test_one_deadline_for_all_of_it(answer):
    async def story():
        async with web(lambda path: answer) as site, fetching(timeout_s=0.15) as fetcher:
            started = time.monotonic()
            message = await refused(fetcher, f"{site.url}/?token=secret", "timeout", "timed out", "timeout is 0.15 s")
            assert 0.14 < time.monotonic() - started < 1.5
            assert "secret" not in message
            await asyncio.wait_for(site.left.wait(), 2)
            assert site.connections == 1

    run(story())


def test_the_deadline_covers_lookups_redirects_and_tries():
    async def slow_name(host):
        await asyncio.sleep(30)

    async def slow_redirect(writer):
        await asyncio.sleep(0.06)
        writer.write(redirect("/", "302 Found\r\nConnection: close"))

    async def story():
        async with fetching(timeout_s=0.1, resolve=slow_name) as fetcher:
            await refused(fetcher, "http://slow.example/", "timeout", "0.1 s")
        async with web(lambda path: slow_redirect) as site, fetching(timeout_s=0.15, max_redirects=50) as fetcher:
            await refused(fetcher, site.url, "timeout", "0.15 s")
            assert 2 <= len(site.requests) <= 4
        answers = iter([ok(b"", status="503 Busy"), forever])
        async with web(lambda path: next(answers)) as site, fetching(timeout_s=0.2) as fetcher:
            await refused(fetcher, site.url, "timeout", "0.2 s")
            assert len(site.requests) == 2

    run(story())


def test_a_caller_who_leaves_closes_the_connection():
    async def story():
        async with web(lambda path: drip_body) as site, fetching() as fetcher:
            task = asyncio.ensure_future(fetcher.fetch(site.url, name=NAME))
            while not site.requests:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.02)
            assert not site.left.is_set()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(site.left.wait(), 2)

    run(story())


def test_connections_are_bounded():
    async def story():
        async def busy(writer):
            await asyncio.sleep(0.02)
            writer.write(ok(b"x", "Connection: close"))

        async with web(lambda path: busy) as site, fetching(resolve=names(**{c: [SITE] for c in "abcdef"})) as fetcher:
            urls = [f"http://{host}.example:{site.port}/" for host in "abcdef" for _ in range(18)]
            assert await asyncio.gather(*(fetcher.fetch(url, name=NAME) for url in urls)) == [b"x"] * len(urls)
            assert 30 < site.max_open <= 64
        async with web(lambda path: busy) as site, fetching() as fetcher:
            await asyncio.gather(*(fetcher.fetch(site.url, name=NAME) for _ in range(40)))
            assert site.max_open == 16

    run(story())


# Faults


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_asked_again(status):
    async def story():
        answers = iter([ok(b"busy", status=f"{status} Busy"), ok()])
        async with web(lambda path: next(answers)) as site, fetching() as fetcher:
            assert await fetcher.fetch(site.url, name=NAME) == DATA
            assert len(site.requests) == 2

    run(story())


def test_three_times_at_most_and_not_past_the_deadline():
    async def story():
        async with web(ok(b"", status="503 Busy")) as site, fetching() as fetcher:
            started = time.monotonic()
            await refused(fetcher, site.url, "status", "503")
            assert 0.4 <= time.monotonic() - started < 2
            assert len(site.requests) == 3
        async with web(ok(b"", status="503 Busy")) as site, fetching(timeout_s=0.3) as fetcher:
            # No time is left for the second pause, so what is known is said at once.
            await refused(fetcher, site.url, "status", "503")
            assert len(site.requests) == 2

    run(story())


@pytest.mark.parametrize("status", [204, 206, 300, 304, 400, 401, 403, 404, 410, 500, 501, 999])
def test_other_statuses_are_final(status):
    async def story():
        async with web(ok(b"", "Content-Type: text/html", status=f"{status} Secret Words")) as site:
            async with fetching() as fetcher:
                message = await refused(fetcher, f"{site.url}/a?token=secret", "status", str(status), site.url)
            assert "secret" not in message.lower()
            assert len(site.requests) == 1

    run(story())


def test_a_connection_that_fails_is_tried_again():
    async def story():
        async with web(ok()) as gone:
            pass
        async with fetching() as fetcher:
            await refused(fetcher, gone.url, "refused", gone.url, "no connection")
            assert connections() == [SITE] * 3

            task = asyncio.ensure_future(fetcher.fetch(gone.url, name=NAME))
            await asyncio.sleep(0.05)
            async with web(ok(), port=gone.port):
                assert await task == DATA

    run(story())


def test_a_name_that_dns_does_not_know():
    async def story():
        async with fetching(resolve=names()) as fetcher:
            message = await refused(fetcher, "http://nowhere.example/a?token=secret", "dns", "nowhere.example")
            assert "Name or service" not in message and "secret" not in message

    run(story())


@pytest.mark.parametrize(
    "answer",
    [
        ok(DATA[:10], "Connection: close", length=1000),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\nff\r\nabc",
        b"HTTP/1.1 200 OK\r\nConnection: close",
        lambda path: hang_up,
    ],
    ids=["short body", "short chunk", "short head", "no head"],
)
def test_answers_that_end_too_early(answer):
    async def story():
        async with web(answer) as site, fetching() as fetcher:
            await refused(fetcher, site.url, "refused", site.url, "broke the connection off")
            assert len(site.requests) == site.connections == 3

    run(story())


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\nConnection: close",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n1234567",
        b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 10_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X-Many: 1\r\n" * 200 + b"\r\n",
    ],
    ids=["ssh", "negative", "two lengths", "long head", "many heads"],
)
def test_what_is_not_http(answer):
    async def story():
        async with web(answer) as site, fetching() as fetcher:
            message = await refused(fetcher, site.url, "refused", "does not answer as a web server does")
            assert "SSH" not in message and "X-" not in message

    run(story())


# Size and kind


def test_too_large_by_its_length_or_while_it_comes():
    async def story():
        async with web(ok(DATA)) as site, fetching(max_bytes=len(DATA) - 1) as fetcher:
            await refused(fetcher, site.url, "too_large", "100000 bytes", "at most 99999")
        async with web(lambda path: more_than_enough) as site, fetching(max_bytes=200_000) as fetcher:
            await refused(fetcher, site.url, "too_large", "at most 200000")
            await asyncio.wait_for(site.left.wait(), 2)
        async with web(ok(b"a", length=10**15)) as site, fetching() as fetcher:
            await refused(fetcher, site.url, "too_large", str(10**15))

    run(story())


def test_a_length_that_lies_gives_no_byte_more():
    async def rest_comes_late(writer):
        writer.write(ok(DATA[:10]))
        await asyncio.sleep(0.05)
        writer.write(DATA[10:])

    async def story():
        async with web(lambda path: rest_comes_late) as site, fetching(max_bytes=10) as fetcher:
            assert await fetcher.fetch(site.url, name=NAME) == DATA[:10]
        async with web(ok(DATA, length=10)) as site, fetching() as fetcher:
            await refused(fetcher, site.url, "refused", "does not answer as a web server does")

    run(story())


def test_nothing_is_unpacked():
    bomb = gzip.compress(bytes(50_000_000))

    async def story():
        for coding in ("gzip", "GZIP", "deflate", "br", "gzip, identity", "x-secret"):
            async with web(ok(bomb, f"Content-Encoding: {coding}")) as site, fetching() as fetcher:
                message = await refused(fetcher, site.url, "not_an_image", "compressed")
                assert "secret" not in message
        # The same bytes, not marked, are handed on as they are.
        async with web(ok(bomb)) as site, fetching() as fetcher:
            assert await fetcher.fetch(site.url, name=NAME) == bomb

    run(story())


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("text/html; charset=utf-8", "text/html"),
        ("Text/Plain", "text/plain"),
        ("text/secret", "with text,"),
        ("application/json", "application/json"),
        ("image/svg+xml", "image/svg+xml"),
    ],
)
def test_what_says_that_it_is_no_picture(kind, word):
    async def story():
        async with web(ok(b"<html>", f"Content-Type: {kind}")) as site, fetching() as fetcher:
            assert "secret" not in await refused(fetcher, site.url, "not_an_image", word)

    run(story())


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Self-signed certificates for site.example, one of them past its time."""
    folder = tmp_path_factory.mktemp("certificates")
    (folder / "names").write_text("subjectAltName=DNS:site.example")
    key = "req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=x -keyout {0}.key -out {0}.csr"
    certificate = "x509 -req -in {0}.csr -signkey {0}.key -days {1} -extfile names -out {0}.pem"
    for name, days in (("good", 2), ("old", -1)):
        for command in (key, certificate):
            arguments = ["openssl", *command.format(name, days).split()]
            subprocess.run(arguments, check=True, capture_output=True, timeout=60, cwd=folder)
    return folder


def server_tls(certificates, name):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
    return context


@pytest.mark.parametrize(
    ("host", "certificate", "trusted", "word"),
    [
        ("site", "good", True, None),
        ("site", "good", False, "signed by itself"),
        ("other", "good", True, "for another host"),
        ("site", "old", True, "has expired"),
    ],
)
def test_certificates_are_checked_for_the_name_in_the_url(certificates, monkeypatch, host, certificate, trusted, word):
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates / f"{certificate}.pem"))

    async def story():
        resolve = names(site=[SITE], other=[SITE])
        async with web(ok(), tls=server_tls(certificates, certificate)) as site, fetching(resolve=resolve) as fetcher:
            url = f"https://{host}.example:{site.port}/"
            if word is None:
                assert await fetcher.fetch(url, name=NAME) == DATA
            else:
                await refused(fetcher, url, "tls", f"certificate of https://{host}.example", word)
                assert site.requests == [] and connections() == [SITE]  # not tried again

    run(story())


def test_no_tls_where_there_is_none_and_no_way_back_from_it(certificates, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "good.pem"))

    def say_what(reader, writer):
        writer.write(b"HTTP/1.1 400 This Is Plain\r\n\r\n")
        writer.close()

    async def story():
        async with await asyncio.start_server(say_what, SITE, 0) as plain, fetching() as fetcher:
            await refused(fetcher, f"https://{SITE}:{plain.sockets[0].getsockname()[1]}/", "tls", "no TLS connection")
        async with web(ok()) as plain, fetching(resolve=names(site=[SITE])) as fetcher:
            async with web(redirect(plain.url), tls=server_tls(certificates, "good")) as secure:
                url = f"https://site.example:{secure.port}/"
                await refused(fetcher, url, "not_allowed", "from https to http")
            assert plain.requests == []

    run(story())


# The fetcher itself


def test_closed_it_fetches_no_more():
    async def story():
        async with web(lambda path: forever) as site, fetching() as fetcher:
            task = asyncio.ensure_future(fetcher.fetch(site.url, name=NAME))
            while not site.requests:
                await asyncio.sleep(0.005)
            await fetcher.close()
            with pytest.raises(FetchError, match="going down"):
                await task
            await refused(fetcher, site.url, "refused", "going down")
            assert site.connections == 1

    run(story())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_s": 0.0}, "timeout_s=0.0: must be above 0"),
        ({"timeout_s": float("nan")}, "timeout_s=nan: must be above 0"),
        ({"max_bytes": 0}, "max_bytes=0: must be at least 1"),
        ({"max_redirects": -1}, "max_redirects=-1: must be at least 0"),
        ({"allowed_hosts": ["a/b"]}, "allowed_media_hosts='a/b'"),
        ({"allowed_networks": ["10.0.0.1/8"]}, "allowed_media_networks='10.0.0.1/8'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PictureFetcher(**{"timeout_s": 1.0, "max_bytes": 1, **options})


def test_an_error_is_one_of_a_picture_and_shows_little_of_the_url():
    async def story():
        async with fetching(resolve=names()) as fetcher:
            long = ".".join(["a" * 60] * 4)
            for url in (
                f"http://{long}/" + "b" * 500,
                "s" * 300 + "://host/",
                f"http://127.0.0.1/{long}?secret#secret",
            ):
                with pytest.raises(PictureError) as caught:
                    await fetcher.fetch(url, name=NAME)
                assert isinstance(caught.value, ValueError)
                message = str(caught.value)
                assert "secret" not in message
                assert len(message) < len(NAME) + 80 + 80
                assert not any(url[start : start + 81] in message for start in range(len(url) - 80))

    run(story())
