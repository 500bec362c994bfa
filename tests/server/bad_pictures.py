"""Pictures that a server must refuse, by their data and by where they are: each with the status and the words."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from functools import cache
from typing import Any

from PIL import Image

from .bad_inputs import BadInput, asked, said
from .picture_hosts import HTML, SVG

_PART = "messages[0].content[0]"


def _png(width: int, height: int, *, pixels: bytes = b"", depth: int = 1, colour: int = 0) -> bytes:
    """A PNG whose header says what is given, whatever its pixels are. pixels: compressed."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@cache
def _bomb() -> bytes:
    """A sound PNG, 30000x30000, black: 900 million pixels in 110 kB."""
    packer, row = zlib.compressobj(1), bytes(1 + 30_000 // 8)
    rows = b"".join(packer.compress(row * 1000) for _ in range(30))
    return _png(30_000, 30_000, pixels=rows + packer.flush())


@cache
def _encoded(kind: str, size: tuple[int, int] = (64, 48)) -> bytes:
    file = io.BytesIO()
    Image.radial_gradient("L").resize(size).convert("RGB").save(file, kind)
    return file.getvalue()


def sound_picture(seed: int) -> bytes:
    """A PNG that decodes, another for each seed."""
    return _encoded("PNG", (64 + seed, 48))


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def picture_part(url: Any, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def _given(name: str, url: Any, *words: str, **more: Any) -> BadInput:
    return asked(name, [picture_part(url)], *words, **{"param": _PART, "code": "invalid_image", **more})


def _file(name: str, data: bytes, *words: str, **more: Any) -> BadInput:
    return _given(name, data_url(data), *words, **more)


def _fetched(name: str, url: str, *words: str, code: str = "not_allowed", is_guarded: bool = True) -> BadInput:
    return _given(name, url, *words, status=422, code=f"image_{code}", is_guarded=is_guarded)


_NO_PICTURE = "not a picture, or of a format that is not served"
_DAMAGED = "damaged or truncated"

_PARTS = (
    asked("a picture's part without one", [{"type": "image_url"}], "must be a map", param=f"{_PART}.image_url"),
    asked("a picture's URL alone", [{"type": "image_url", "image_url": "http://{site}/"}], "of type str: must be a map",
          param=f"{_PART}.image_url"),
    asked("a URL that is a number", [picture_part(5)], "of type int: must be a string", param=f"{_PART}.image_url.url"),
    asked("a URL that is null", [picture_part(None)], "must be a string", param=f"{_PART}.image_url.url"),
    asked("an unknown detail", [picture_part("data:", detail="ultra")], "auto, low, high",
          param=f"{_PART}.image_url.detail"),
    asked("an unknown key beside the URL", [picture_part("data:", size=5)], "'size'", param=f"{_PART}.image_url"),
    asked("a key beside the picture", [{**picture_part("data:"), "text": "x"}], "'text'", param=_PART),
    asked("a picture of the library", [{"type": "image", "image": "x"}], "must be a PIL picture",
          param=f"{_PART}.image"),
    asked("17 pictures", [picture_part(data_url(b"x"))] * 17, "17 pictures", "at most 16", param="messages"),
    said("17 pictures in turns", [{"role": "user", "content": [picture_part("http://{other}:{port}/")]}] * 17,
         "17 pictures", param="messages"),
    asked("pictures that are too many tokens", [picture_part(data_url(_encoded("PNG"))),
          {"type": "text", "text": "word " * 500}], "tokens long, images included"),
)  # fmt: skip

_DATA = (
    _given("an empty URL", "", "files are not read", param=f"{_PART}.image_url.url"),
    _given("a bare path", "/etc/passwd", "files are not read", param=f"{_PART}.image_url.url"),
    _given("a file URL", "file:///etc/passwd", "files are not read", param=f"{_PART}.image_url.url"),
    _given("a file URL of a host", "FILE://localhost/etc/hosts", "files are not read", param=f"{_PART}.image_url.url"),
    _given("a relative path", "../../pictures/cat.png", "files are not read", param=f"{_PART}.image_url.url"),
    _given("ftp", "ftp://127.0.0.1/cat.png", "by http(s)", param=f"{_PART}.image_url.url"),
    _given("gopher", "gopher://127.0.0.1:25/_HELO", "by http(s)", param=f"{_PART}.image_url.url"),
    _given("a script", "javascript:alert(1)", "by http(s)", param=f"{_PART}.image_url.url"),
    _given("a URL that begins with a space", " http://{site}/", "by http(s)", param=f"{_PART}.image_url.url"),
    _given("data of another kind", "data:text/html;base64,PGI+", "must begin like data:image/png;base64,"),
    _given("data that are not encoded", "data:image/png,\x89PNG", "must begin like"),
    _given("base64 with a space", "data:image/png;base64,iVBO Rw0K", "are not base64"),
    _given("base64 without its padding", "data:image/png;base64,iVBORw0KGg", "are not base64"),
    _given("base64 for URLs", "data:image/png;base64,__--", "are not base64"),
    _given("base64 that is quoted", "data:image/png;base64,iVBORw0KGgo%3D", "are not base64"),
    _given("a surrogate in base64", "data:image/png;base64,\ud800AAA", "are not base64"),
    _given("no data", "data:image/png;base64,", _NO_PICTURE),
    _given("3 MB of data", "data:image/png;base64," + "A" * 4_000_000, "at most 2097152 are allowed"),
    _file("HTML", HTML, _NO_PICTURE),
    _file("SVG", SVG, _NO_PICTURE),
    _file("a text", b"hello", _NO_PICTURE),
    _file("PostScript, which PIL would run", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", _NO_PICTURE),
    _file("a PPM, which is not served", b"P6 1 1 255 \x00\x00\x00", _NO_PICTURE),
    _file("a PNG's signature alone", b"\x89PNG\r\n\x1a\n", _NO_PICTURE),
    _file("a PNG of 0x0", _png(0, 0), _NO_PICTURE),
    _file("a PNG of 0x5", _png(0, 5), _NO_PICTURE),
    _file("a GIF of 0x0", b"GIF89a" + bytes(4) + b"\x00\x00\x00\x3b", _NO_PICTURE),
    _file("a PNG whose pixels are missing", _png(9, 9), _DAMAGED),
    _file("a PNG whose pixels are noise", _png(9, 9, pixels=b"\xff" * 40), _DAMAGED),
    _file("a PNG whose header says 60000x60000", _png(60_000, 60_000), "more pixels than a picture may have"),
    _file("a PNG whose header says 2147483647x2147483647", _png(2**31 - 1, 2**31 - 1), "more pixels"),
    _file("a PNG whose header says 9000x9000", _png(9000, 9000), "81000000 pixels; at most 67108864 are allowed"),
    _file("a PNG of 60000000x1", _png(60_000_000, 1), "times longer than wide"),
    _file("a bomb: 900 million pixels", _bomb(), "more pixels than a picture may have (at most 67108864)"),
    _file("half a JPEG", _encoded("JPEG")[:400], _DAMAGED),
    _file("a JPEG's first bytes", b"\xff\xd8\xff\xe0\x00\x10JFIF", _DAMAGED),
    _file("half a WebP", _encoded("WEBP")[:60], _DAMAGED),
    _file("half a GIF", _encoded("GIF")[:1000], _DAMAGED),
    _file("half a BMP", _encoded("BMP")[:2000], _DAMAGED),
    _file("half a TIFF", _encoded("TIFF")[:2000], _DAMAGED),
    asked("the second picture is none", [picture_part(data_url(_encoded("PNG"))), picture_part(data_url(b"x"))],
          _NO_PICTURE, param="messages[0].content[1]", code="invalid_image"),
)  # fmt: skip

_HOST = "http://{site}:{port}"

_FETCHED = (
    _fetched("a page", f"{_HOST}/page.html", "answers with text/html", code="not_an_image"),
    _fetched("JSON", f"{_HOST}/data.json", "answers with application/json", code="not_an_image"),
    _fetched("an SVG", f"{_HOST}/drawing.svg", "answers with image/svg+xml", code="not_an_image"),
    _fetched("a compressed answer", f"{_HOST}/packed.png", "a compressed file", code="not_an_image"),
    _given("a page that is called a PNG", f"{_HOST}/page.png", _NO_PICTURE, is_guarded=True),
    _given("an SVG that is called a PNG", f"{_HOST}/drawing.png", _NO_PICTURE, is_guarded=True),
    _given("an empty file", f"{_HOST}/empty.png", _NO_PICTURE, is_guarded=True),
    _given("a PNG that is cut", f"{_HOST}/cut.png", _DAMAGED, is_guarded=True),
    _fetched("404", f"{_HOST}/no-such.png", "the status 404", code="status"),
    _fetched("403", f"{_HOST}/forbidden.png", "the status 403", code="status"),
    _fetched("500", f"{_HOST}/broken.png", "the status 500", code="status"),
    _fetched("204", f"{_HOST}/nothing.png", "the status 204", code="status"),
    _fetched("1 TB, as it says", f"{_HOST}/long.png", "1000000000000 bytes", "at most 2097152", code="too_large"),
    _fetched("13 MB, as it turns out", f"{_HOST}/endless.png", "at most 2097152", code="too_large"),
    _fetched("a slow answer", f"{_HOST}/slow.png", "timed out; the timeout is 0.5 s", code="timeout", is_guarded=False),
    _fetched("no answer", f"{_HOST}/silent.png", "timed out; the timeout is 0.5 s", code="timeout", is_guarded=False),
    _fetched("no HTTP", f"{_HOST}/noise.png", "does not answer as a web server does", code="refused"),
    _fetched("a head of 100 kB", f"{_HOST}/head.png", "does not answer as a web server does", code="refused"),
    _fetched("https where http is", "https://{site}:{port}/picture.png", "no TLS connection", code="tls"),
    _fetched("redirects in a circle", f"{_HOST}/loop", "more than 5 redirects", code="redirects"),
    _fetched("a redirect to nowhere", f"{_HOST}/nowhere", "without saying where to", code="redirects"),
)

# What may be gone in a moment is tried three times.
_PASSING = (
    _fetched("503, again and again", f"{_HOST}/busy.png", "the status 503", code="status"),
    _fetched("a connection that is closed", f"{_HOST}/mute.png", "broke the connection off", code="refused"),
    _fetched("less than it said", f"{_HOST}/short.png", "broke the connection off", code="refused"),
    _fetched("a port where nothing is", "http://{site}:9/picture.png", "no connection", code="refused"),
    _fetched("a DNS that does not answer", "http://lame.example/cat.png", "does not answer for lame", code="dns"),
)

_PLACES = (
    _fetched("loopback", "http://{other}:{port}/picture.png", "127.0.0.1 is an address that is neither public"),
    _fetched("loopback, spelled short", "http://127.1:{port}/picture.png", "127.0.0.1 is an address"),
    _fetched("loopback in hexadecimal", "http://0x7f000001:{port}/picture.png", "127.0.0.1 is an address"),
    _fetched("loopback in octal", "http://0177.0.0.01:{port}/picture.png", "127.0.0.1 is an address"),
    _fetched("loopback as one number", "http://2130706433:{port}/picture.png", "127.0.0.1 is an address"),
    _fetched("loopback of IPv6", "http://[::1]:{port}/picture.png", "::1 is an address that is neither public"),
    _fetched("loopback in IPv6", "http://[::ffff:127.0.0.1]:{port}/x", "is an address that is neither public"),
    _fetched("this host", "http://0.0.0.0:{port}/picture.png", "0.0.0.0 is an address that is neither public"),
    _fetched("metadata", "http://169.254.169.254/latest/meta-data/", "169.254.169.254 is an address"),
    _fetched("metadata as one number", "http://2852039166/latest/", "169.254.169.254 is an address"),
    _fetched("a private network", "http://10.0.0.7/cat.png", "10.0.0.7 is an address"),
    _fetched("a name for loopback", "http://loopback.example:{port}/picture.png", "loopback.example has an address"),
    _fetched("a name for metadata", "http://metadata.example/latest/", "metadata.example has an address"),
    _fetched("a name for loopback of IPv6", "http://six.example:{port}/picture.png", "six.example has an address"),
    _fetched("a name for loopback in IPv6", "http://mapped.example:{port}/x", "mapped.example has an address"),
    _fetched("a name with a private address too", "http://mixed.example:{port}/picture.png", "mixed.example has"),
    _fetched("a name that leads elsewhere the second time", "http://rebinding{fresh}.example:{port}/back",
             "an address that is neither public nor allowed here"),
    _fetched("an unknown name", "http://nowhere.example/cat.png", "DNS knows no host nowhere.example", code="dns"),
    _fetched("a name without addresses", "http://empty.example/cat.png", "knows no address", code="dns"),
    _fetched("a redirect to loopback", f"{_HOST}/to-loopback", "redirects to a URL that is refused: 127.0.0.1"),
    _fetched("a redirect to loopback, spelled", f"{_HOST}/to-loopback-spelled", "is refused: 127.0.0.1"),
    _fetched("a redirect to metadata", f"{_HOST}/to-metadata", "redirects to a URL that is refused: 169.254.169.254"),
    _fetched("a redirect to a name for metadata", f"{_HOST}/to-metadata-name", "metadata.example has an address"),
    _fetched("a redirect to a private name", f"{_HOST}/to-private-name", "private.example has an address"),
    _fetched("a redirect to a file", f"{_HOST}/to-file", "the URL has the scheme 'file'"),
    _fetched("a redirect to data", f"{_HOST}/to-data", "the URL has the scheme 'data'"),
    _fetched("a redirect with a user", f"{_HOST}/to-user", "holds a user name or password"),
    _fetched("a redirect with a backslash", f"{_HOST}/to-backslash", "holds a backslash"),
    _fetched("a user's name", "http://user:word@{site}:{port}/picture.png", "a user name or password"),
    _fetched("the site as a user's name", "http://{site}@{other}:{port}/picture.png", "a user name or password"),
    _fetched("a backslash", "http://{other}:{port}\\@{site}/picture.png", "a backslash, a space"),
    _fetched("backslashes for slashes", "http:\\\\{other}:{port}\\picture.png", "a backslash, a space"),
    _fetched("a tab in the host", "http://127.0\t.0.1:{port}/picture.png", "a control character"),
    _fetched("a new line in the path", "http://{site}:{port}/a\r\nHost: x", "a control character"),
    _fetched("a surrogate in the host", "http://\ud800/", "a control character"),
    _fetched("full-width digits", "http://\uff11\uff12\uff17.0.0.1:{port}/", "127.0.0.1 is an address"),
    _fetched("no host", "http:///picture.png", "names no host"),
    _fetched("no slashes", "http:{site}", "names no host"),
    _fetched("a port beyond all", "http://{site}:70000/", "a port from 1 to 65535"),
    _fetched("a host in quotes", 'http://"127.0.0.1"/', "the URL"),
    _fetched("a URL of 9000 characters", "http://{site}/" + "a" * 9000, "at most 8192 are allowed"),
)  # fmt: skip

PICTURE_INPUTS = (*_PARTS, *_DATA, *_FETCHED, *_PASSING, *_PLACES)
