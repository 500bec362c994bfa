"""A web server of this process whose answers are anything but pictures, and names that lead anywhere but to it."""

from __future__ import annotations

import io
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO

from PIL import Image

# One port on two addresses: pictures may be fetched from SITE, and from OTHER only where a test allows it.
SITE, OTHER = "127.0.0.2", "127.0.0.1"
HTML = b"<!doctype html><title>not here</title><p>This is no picture.</p>"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'

# Longer than the servers of the tests wait.
_SILENCE_S = 0.8
# As much as is ever sent to who does not hang up.
_ENDLESS_PARTS = 200

Answer = bytes | Callable[[BinaryIO], None]


@dataclass(frozen=True)
class PictureHost:
    """seen: the paths asked for at OTHER."""

    port: int
    seen: list[str]


@contextmanager
def picture_host() -> Iterator[PictureHost]:
    seen: list[str] = []
    with _Web((OTHER, 0), _Handler) as other:
        port = other.server_address[1]
        other.seen = seen
        with _Web((SITE, port), _Handler) as site:
            other.answers = site.answers = _answers(port)
            threads = [threading.Thread(target=web.serve_forever, args=(0.05,)) for web in (other, site)]
            for thread in threads:
                thread.start()
            yield PictureHost(port, seen)
            other.shutdown()
            site.shutdown()
            for thread in threads:
                thread.join()


class Names:
    """A resolver. Names that begin with "rebinding" lead to SITE when they are asked for first, later to OTHER."""

    _ADDRESSES = {
        "site.example": (SITE,),
        "loopback.example": (OTHER,),
        "metadata.example": ("169.254.169.254",),
        "private.example": ("10.0.0.7",),
        "mixed.example": (SITE, "192.168.0.7"),
        "six.example": ("::1",),
        "mapped.example": ("::ffff:127.0.0.1",),
        "empty.example": (),
    }

    def __init__(self) -> None:
        self._asked: Counter[str] = Counter()

    async def __call__(self, host: str) -> Sequence[str]:
        self._asked[host] += 1
        if host.startswith("rebinding"):
            return (SITE if self._asked[host] == 1 else OTHER,)
        if host not in self._ADDRESSES:
            raise socket.gaierror(socket.EAI_AGAIN if host.startswith("lame") else socket.EAI_NONAME, "no such name")
        return self._ADDRESSES[host]


class _Web(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    answers: dict[str, Answer]
    seen: list[str] | None = None


class _Handler(socketserver.StreamRequestHandler):
    server: _Web

    def handle(self) -> None:
        """One request, one answer."""
        with suppress(ConnectionError):
            if self.rfile.peek(1)[:1] == b"\x16":  # TLS, which has no lines
                self.wfile.write(_answer("400 Bad Request"))
                return
            line, head = self.rfile.readline(65536), b"-"
            while head not in (b"\r\n", b""):
                head = self.rfile.readline(65536)
            path = line.split()[1].decode() if line.count(b" ") == 2 else ""
            if self.server.seen is not None:
                self.server.seen.append(path)
            answer = self.server.answers.get(path, _answer("404 Not Found"))
            if isinstance(answer, bytes):
                self.wfile.write(answer)
            else:
                answer(self.wfile)


def _answers(port: int) -> dict[str, Answer]:
    redirects = {
        "loop": f"http://{SITE}:{port}/loop",
        "back": "/picture.png",
        "to-loopback": f"http://{OTHER}:{port}/picture.png",
        "to-loopback-spelled": f"http://0x7f.1:{port}/picture.png",
        "to-metadata": "http://169.254.169.254/latest/meta-data/",
        "to-metadata-name": "http://metadata.example/latest/meta-data/",
        "to-private-name": "http://private.example/picture.png",
        "to-file": "file:///etc/passwd",
        "to-data": "data:image/png;base64,AAAA",
        "to-user": f"http://user:word@{SITE}:{port}/picture.png",
        "to-backslash": f"http://{SITE}:{port}\\@{OTHER}/picture.png",
    }
    plain = {
        "picture.png": _answer(body=_picture(), kind="image/png"),
        "page.html": _answer(body=HTML),
        "page.png": _answer(body=HTML, kind="image/png"),
        "data.json": _answer(body=b"{}", kind="application/json"),
        "drawing.svg": _answer(body=SVG, kind="image/svg+xml"),
        "drawing.png": _answer(body=SVG, kind="image/png"),
        "empty.png": _answer(kind="image/png"),
        "cut.png": _answer(body=_picture()[:60], kind="image/png"),
        "broken.png": _answer("500 Internal Server Error"),
        "busy.png": _answer("503 Service Unavailable"),
        "forbidden.png": _answer("403 Forbidden", body=HTML),
        "nothing.png": _answer("204 No Content"),
        "long.png": _answer(kind="image/png", length=10**12),
        "short.png": _answer(body=b"\x89PNG", kind="image/png", length=5000),
        "packed.png": _answer("200 OK\r\nContent-Encoding: gzip", body=b"\x1f\x8b", kind="image/png"),
        "head.png": _answer(f"200 OK\r\nX-Long: {'x' * 100_000}", kind="image/png"),
        "nowhere": _answer("302 Found"),
        "noise.png": b"\x00\xff\x00 this is no HTTP\r\n\r\n",
        "mute.png": b"",
    }
    moved = {name: _answer(f"302 Found\r\nLocation: {target}") for name, target in redirects.items()}
    slow: dict[str, Answer] = {"/silent.png": _silent, "/slow.png": _slow, "/endless.png": _endless}
    return {f"/{name}": answer for name, answer in {**plain, **moved}.items()} | slow


def _answer(status: str = "200 OK", *, body: bytes = b"", kind: str = "text/html", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n"
    return head.encode("latin-1") + body


def _picture() -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).save(file, "PNG")
    return file.getvalue()


def _silent(out: BinaryIO) -> None:
    time.sleep(_SILENCE_S)


def _slow(out: BinaryIO) -> None:
    """A byte now and then: each read of it is quick."""
    picture = _picture()
    out.write(_answer(kind="image/png", length=len(picture)))
    end = time.monotonic() + _SILENCE_S
    for byte in picture:
        if time.monotonic() > end:
            return
        out.write(bytes([byte]))
        time.sleep(0.05)


def _endless(out: BinaryIO) -> None:
    out.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nConnection: close\r\n\r\n")
    for _ in range(_ENDLESS_PARTS):
        out.write(b"\x89" * 65536)
