"""A server of this process on a free port, over scripted ranks."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
import uvloop

from dist_vlm.async_llm import AsyncLLM
from dist_vlm.config_server import ServerConfig
from dist_vlm.executor.fake import checksum_token
from dist_vlm.server.building import services_of
from dist_vlm.server.http import http_config
from dist_vlm.server.services import Services


@dataclass
class Live:
    """url: without a path. services, loop: the server's own; the loop runs in another thread."""

    url: str
    services: Services
    loop: asyncio.AbstractEventLoop

    @property
    def llm(self) -> AsyncLLM:
        return self.services.llm

    def call(self, work: Any) -> Any:
        """Runs a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)


@contextmanager
def serving(llm: AsyncLLM, config: ServerConfig) -> Iterator[Live]:
    started: list[Live] = []
    ready, stop = threading.Event(), asyncio.Event()
    failure: list[BaseException] = []

    async def run() -> None:
        async with services_of(llm, config) as services:
            # Named as TCP, or asyncio leaves Nagle's algorithm on: 40 ms a request.
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
                listener.bind(("127.0.0.1", 0))
                url = f"http://127.0.0.1:{listener.getsockname()[1]}"
                http = uvicorn.Server(http_config(services))
                http.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
                serving = asyncio.create_task(http._serve([listener]))
                started.append(Live(url, services, asyncio.get_running_loop()))
                while not http.started and not serving.done():
                    await asyncio.sleep(0.005)
                ready.set()
                await stop.wait()
                http.should_exit = http.force_exit = True
                await serving

    def target() -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(run())
        except BaseException as error:
            failure.append(error)
            ready.set()

    thread = threading.Thread(target=target, name="live-server")
    thread.start()
    assert ready.wait(60)
    if failure:
        raise failure[0]
    try:
        yield started[0]
    finally:
        started[0].loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        if failure:
            raise failure[0]


def scripted_text(live: Live, prompt: list[int], count: int = 4) -> str:
    """What scripted ranks answer to a prompt's tokens."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(checksum_token(tokens, len(tokens)))
    text: str = live.llm.get_tokenizer().decode(tokens[len(prompt) :], skip_special_tokens=True)
    return text
