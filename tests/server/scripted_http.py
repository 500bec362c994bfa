"""A stand-in for the server: the page's files as they are served, and answers from a script."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from dist_vlm.server.page import FILES, HEADERS

MODEL = "a model <b>of</b> its own"
PREFIX = "/some/prefix"
WAIT_S = 10.0

Part = bytes | threading.Event | float


@dataclass
class Reply:
    """parts: each sent by itself; an event is waited for, a number slept, in seconds. length: what the header says;
    without it the body ends with the connection."""

    parts: Iterable[Part]
    status: int = 200
    kind: str = "text/event-stream; charset=utf-8"
    length: int | None = None


@dataclass
class StandIn:
    """What the server says, and what it has been told.

    bodies: of the chats, in order. left: set when a client went away during an answer. key: asked for as the password
    of Basic, if any.
    """

    url: str
    replies: deque[Reply] = field(default_factory=deque)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    paths: list[str] = field(default_factory=list)
    models_status: int = 200
    key: str | None = None

    def reset(self) -> None:
        self.replies.clear()
        self.bodies.clear()
        self.paths.clear()
        self.left.clear()
        self.models_status, self.key = 200, None


def handler_of(stand_in: Callable[[], StandIn]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state, path = stand_in(), self.path.removeprefix(PREFIX)
            state.paths.append(self.path)
            if not self._may_enter(state):
                return
            if path == "/v1/models":
                card = {"id": MODEL, "object": "model", "max_model_len": 4096}
                listing = {"object": "list", "data": [card]}
                failure = {"error": {"message": "loading still"}}
                self._json(state.models_status, listing if state.models_status == 200 else failure)
            elif path in FILES:
                name, kind = FILES[path]
                content = files("dist_vlm.server").joinpath("static", name).read_bytes()
                self._start(200, {**HEADERS, "Content-Type": f"{kind}; charset=utf-8"})
                self.wfile.write(content)
            else:
                self._json(404, {"error": {"message": f"nothing at {path}"}})

        def do_POST(self) -> None:
            state = stand_in()
            state.paths.append(self.path)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if not self._may_enter(state):
                return
            assert self.path.endswith("/v1/chat/completions") and self.headers["Content-Type"] == "application/json"
            state.bodies.append(json.loads(body))
            reply = state.replies.popleft()
            length = {} if reply.length is None else {"Content-Length": str(reply.length)}
            self._start(reply.status, {"Content-Type": reply.kind, **length})
            try:
                for part in reply.parts:
                    self._send(part)
            except ConnectionError:
                state.left.set()

        def _send(self, part: Part) -> None:
            if isinstance(part, bytes):
                self.wfile.write(part)
            elif isinstance(part, threading.Event):
                assert part.wait(WAIT_S)
            else:
                time.sleep(part)

        def _may_enter(self, state: StandIn) -> bool:
            expected = None if state.key is None else "Basic " + base64.b64encode(f"me:{state.key}".encode()).decode()
            if expected in (None, self.headers["Authorization"]):
                return True
            # As the server does: a browser is asked for the password where it shows a page, and nowhere else.
            is_page = "text/html" in self.headers["Accept"]
            self._start(401, {"WWW-Authenticate": 'Basic realm="here"' if is_page else "Bearer"})
            return False

        def _start(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def _json(self, status: int, value: Any) -> None:
            self._start(status, {"Content-Type": "application/json"})
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def event(value: dict[str, Any], newline: str = "\n") -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}{newline}{newline}".encode()


def delta(text: str, *, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": finish, "stop_reason": None}
    return event({"object": "chat.completion.chunk", "choices": [choice], "usage": None})


ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "usage": None})
DONE = b"data: [DONE]\n\n"


def usage(*, completion: int = 3, prompt: int = 1205, cached: int = 1152) -> bytes:
    details = {"cached_tokens": cached}
    numbers = {"prompt_tokens": prompt, "completion_tokens": completion, "prompt_tokens_details": details}
    return event({"choices": [], "usage": numbers})


def answering(*texts: str) -> Reply:
    """A whole answer, one event for each text."""
    return Reply([ROLE, *map(delta, texts), delta("", finish="stop"), usage(), DONE])


@contextmanager
def standing_in() -> Iterator[StandIn]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(lambda: state))
    state = StandIn(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()
