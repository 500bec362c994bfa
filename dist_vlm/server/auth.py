"""Who may call the server."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Collection

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from dist_vlm.server.errors import ApiError

OPEN_PATHS = ("/health", "/ready")
_POLICY_VIOLATION = 1008


class Authentication:
    """Asks for the key on every path but those of health, whether there is something at the path or not.

    A client sends `Authorization: Bearer KEY`; a browser that shows the page may send the key as the password of
    `Basic`, under any name.

    open_paths: compared with the path as it stands: no other spelling of one is open.
    """

    def __init__(self, app: ASGIApp, *, api_key: str, open_paths: Collection[str] = OPEN_PATHS) -> None:
        self._app = app
        self._key = api_key.encode()
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in self._open_paths):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            request = Request(scope)
            headers = request.headers.getlist("authorization")
            if len(headers) == 1 and self._knows(headers[0]):
                await self._app(scope, receive, send)
            else:
                await _refusal(request)(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
        else:
            raise ValueError(f"a connection of type {scope['type']!r} is not served")

    def _knows(self, header: str) -> bool:
        scheme, _, value = header.partition(" ")
        given = value.strip(" ").encode("latin-1")  # the bytes that were sent
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given, self._key)


def _refusal(request: Request) -> JSONResponse:
    given = "a wrong key" if "authorization" in request.headers else "no key"
    text = f"the request has {given}: must have the header Authorization: Bearer KEY"
    error = ApiError(401, text, code="invalid_api_key")
    # A browser asks for the password where it is a page that it wants.
    is_page = request.method == "GET" and "text/html" in request.headers.get("accept", "")
    challenge = 'Basic realm="dist-vlm", charset="UTF-8"' if is_page else "Bearer"
    return JSONResponse(error.body, error.status, headers={"WWW-Authenticate": challenge})
