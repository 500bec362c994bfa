"""Runs the server from its configuration to its end."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
from contextlib import closing
from types import FrameType

import uvicorn
import uvloop

from dist_vlm.async_llm import AsyncLLM
from dist_vlm.config import EngineConfig
from dist_vlm.config_server import ServerConfig
from dist_vlm.engine.core_client import CoreClient
from dist_vlm.server.building import services_of
from dist_vlm.server.http import http_config
from dist_vlm.server.services import Services

_log = logging.getLogger(__name__)

# A thread that computes in Python lets the event loop have its turn after this long.
_SWITCH_S = 0.0005


def serve(engine: EngineConfig, server: ServerConfig, client: CoreClient | None = None) -> int:
    """Serves until a SIGTERM or SIGINT, then finishes what is in work. Returns the exit status: 0, or 1 if the engine
    ended by itself.

    engine, server: resolved. client: the engine, not started, in place of one in a process beside this.
    Raises what `AsyncLLM` raises, and `OSError` where the port is taken.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    sys.setswitchinterval(_SWITCH_S)
    # Taken before the minutes that a model may take to load.
    with closing(_listen(server.host, server.port)) as listener:
        signal.signal(signal.SIGTERM, _leave)
        beside = engine.replace(engine_process=client is None)
        llm = AsyncLLM.from_config(beside, client=client, chat_template=server.chat_template)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(_serve(llm, server, listener))
        finally:
            llm.shutdown()


async def _serve(llm: AsyncLLM, config: ServerConfig, listener: socket.socket) -> int:
    async with services_of(llm, config) as services:
        http = _Http(http_config(services))
        # What has been loaded stays: a collection that walked it would hold the event loop for a good part of a second.
        gc.collect()
        gc.freeze()
        end = asyncio.create_task(_end_of_work(services, http))
        host, port = listener.getsockname()[:2]
        scheme = "http" if config.ssl_keyfile is None else "https"
        _log.info("%s is served at %s://%s:%d", services.model, scheme, f"[{host}]" if ":" in host else host, port)
        try:
            await http.serve(sockets=[listener])
        finally:
            end.cancel()
    return 1 if llm.errored else 0


class _Http(uvicorn.Server):
    """Leaves it to us what a signal means: requests in work go on, and newcomers are told."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.asked = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal asks for the end, the next one insists."""
        if self.asked.is_set():
            self.force_exit = self.should_exit = True
        self._loop.call_soon_threadsafe(self.asked.set)


async def _end_of_work(services: Services, http: _Http) -> None:
    """Waits for a signal or the engine's death, and has the server end in good order."""
    asked = asyncio.create_task(http.asked.wait())
    died = asyncio.create_task(services.llm.wait_dead())
    try:
        await asyncio.wait((asked, died), return_when=asyncio.FIRST_COMPLETED)
        if died.done():
            _log.error("the engine has ended, and the server ends with it: %s", died.result())
        else:
            await _drain(services)
    finally:
        asked.cancel()
        died.cancel()
        http.should_exit = True


async def _drain(services: Services) -> None:
    limit = services.config.drain_timeout_s
    _log.info("shutting down: %d requests in work have %g s to end", services.admission.num_taken, limit)
    try:
        async with asyncio.timeout(limit):
            await services.admission.drain()
    except TimeoutError:
        _log.warning("%d requests had not ended after %g s and are cut off", services.admission.num_taken, limit)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `OSError` naming the address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise OSError(f"host = {host!r}, port = {port}: cannot be listened on ({error.strerror or error})") from None
    return listener


def _leave(signum: int, frame: FrameType | None) -> None:
    """While the model loads there is nothing to finish."""
    raise SystemExit(128 + signum)
