"""The page at /, for a person to try the model with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI
from starlette.responses import Response

# Nothing from elsewhere, nothing inline: what an answer says is text and stays text.
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'"
HEADERS = {
    "Content-Security-Policy": f"{_POLICY}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}


def add_page(app: FastAPI) -> None:
    for path, (name, kind) in FILES.items():
        app.add_api_route(path, _sender(name, kind), methods=["GET"], include_in_schema=False)


def _sender(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
    content = files("dist_vlm.server").joinpath("static", name).read_bytes()

    async def send() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return send
