"""A line for each request, with an id that the client sees too."""

from __future__ import annotations

import logging
import re
import time
import uuid
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dist_vlm.server.metrics import Metrics

_log = logging.getLogger("dist_vlm.access")

ID_HEADER = "X-Request-Id"
_CLIENTS_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OTHER = "other"


class AccessLog:
    """Gives each request an id, the client's own where it sent one, and tells of the response when it has ended.

    paths: those that are told of by name in the metrics. quiet: whether to write no lines.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, paths: frozenset[str], quiet: bool) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths
        self._quiet = quiet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(ID_HEADER, "")
        request_id = given if _CLIENTS_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status, began = 0, time.monotonic()

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", [])
                MutableHeaders(scope=message)[ID_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, tell)
        except Exception:
            # The answer to a defect is made outside of this.
            status = status or 500
            raise
        finally:
            self._note(scope, request_id, status, time.monotonic() - began)

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        # 499: the client left before there was an answer.
        shown = status or 499
        self._metrics.responses.labels(path if path in self._paths else _OTHER, str(shown)).inc()
        if self._quiet:
            return
        host = _shown((scope.get("client") or ("-", 0))[0])
        line = "%s %s %d %.1f ms client=%s id=%s"
        _log.info(line, scope["method"], _shown(path), shown, seconds * 1e3, host, request_id)


def _shown(text: str) -> str:
    """As in a URL: what a client chooses can write neither a line nor a word of its own."""
    return quote(text[:200], safe="/:", errors="replace")
