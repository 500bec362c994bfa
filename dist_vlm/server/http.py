"""How the server speaks HTTP."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dist_vlm.server.app import make_app
from dist_vlm.server.services import Services

_KEEP_ALIVE_S = 75
# The most that a request may be before its body, and how long its client has to send that.
MAX_HEAD_BYTES = 65536
HEAD_TIMEOUT_S = 30.0


class BoundedHttp(HttpToolsProtocol):
    """HTTP in C, with the bounds that its parser leaves out: a head without end would be kept in memory, and a client
    that sends none would hold its connection for ever."""

    _timer: asyncio.TimerHandle | None = None
    _is_in_head = True
    _num_head_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_in_head = self._is_in_head
        super().data_received(data)
        if was_in_head and self._is_in_head:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The request's head is too long.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._is_in_head = False
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            raise ValueError("the head is too long")  # the parser's caller answers with a 400
        super().on_headers_complete()

    def _await_head(self) -> None:
        self._stop_timer()
        self._is_in_head, self._num_head_bytes = True, 0
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


def http_config(services: Services) -> uvicorn.Config:
    """For a server over the application of these services."""
    config = services.config
    tls: dict[str, Any] = {}
    if config.ssl_keyfile is not None:
        tls = {
            "ssl_keyfile": config.ssl_keyfile,
            "ssl_certfile": config.ssl_certfile,
            "ssl_ca_certs": config.ssl_ca_certs,
            "ssl_cert_reqs": ssl.VerifyMode(config.ssl_cert_reqs),
        }
    return uvicorn.Config(
        make_app(services),
        log_level=config.uvicorn_log_level,
        access_log=False,  # ours has the request's id
        root_path=config.root_path,
        http=BoundedHttp,
        ws="none",
        lifespan="off",
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=1,
        **tls,
    )
