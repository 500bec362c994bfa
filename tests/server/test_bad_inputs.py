"""What clients get wrong, or try: each such request gets its own answer, and no other request notices."""

from __future__ import annotations

import itertools
import json
import random
import re
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import dist_vlm
from dist_vlm.config_server import ServerConfig
from dist_vlm.engine.chat import ChatOptions
from dist_vlm.engine.chat_content import parse_messages
from dist_vlm.executor.fake import checksum_token
from dist_vlm.media import fetch

from .bad_fields import FIELD_INPUTS
from .bad_inputs import BODY_INPUTS, CHAT, COMPLETIONS, HELLO, TOKENIZE, BadInput
from .bad_pictures import PICTURE_INPUTS, data_url, picture_part, sound_picture
from .live import Live, serving
from .picture_hosts import SITE, Names, PictureHost, picture_host

BAD_INPUTS = (*BODY_INPUTS, *FIELD_INPUTS, *PICTURE_INPUTS)
MAX_MESSAGE = 300
# What a message must not tell of this machine and of the libraries: addresses in memory, paths, their own words.
SECRETS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"0x[0-9a-f]{6,}", r" object at ", r"traceback", r"site-packages", r"\.py\b", r"errno", r"pydantic", r"aiohttp",
        r"\bPIL\.", r"jinja", r"cannot identify image", r"Expecting value", r"Cannot connect", re.escape(sys.prefix),
        re.escape(str(Path(dist_vlm.__file__).parent.parent)), re.escape(str(Path.home())),
    )
]  # fmt: skip
SEED = 20
NUM_CLIENTS = 6
# How often each good input is sent among the bad ones.
NUM_ROUNDS = 8


@pytest.fixture(scope="module")
def host() -> Iterator[PictureHost]:
    with picture_host() as host:
        yield host


@pytest.fixture(scope="module")
def guarded(live: Live, server_config: ServerConfig) -> Iterator[Live]:
    """A second server over the same engine: it fetches from the site and from public addresses alone, has time for it,
    and its names are the tests' own."""
    config = replace(
        server_config, allowed_media_networks=(f"{SITE}/32",), body_timeout_s=1.0, image_fetch_timeout_s=10.0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "SystemResolver", Names)
        with serving(live.llm, config) as guarded:
            yield guarded


class Client:
    """Sends requests to the two servers. Safe for use from several threads."""

    def __init__(self, live: Live, guarded: Live, host: PictureHost) -> None:
        self._urls = {False: live.url, True: guarded.url}
        self._http = httpx.Client(timeout=30)
        self._numbers = itertools.count()
        self._host = host

    def send(self, bad: BadInput) -> httpx.Response:
        url = self._urls[bad.is_guarded] + bad.path
        if bad.body is None:
            return self._http.request(bad.method, url, headers=bad.headers)
        headers = {"Content-Type": "application/json", **bad.headers}
        content = bad.body() if callable(bad.body) else self._encoded(bad.body)
        return self._http.request(bad.method, url, content=content, headers=headers)

    def ask(self, path: str, body: Any) -> Any:
        """The answer to a good request, without what differs from time to time; of a stream, its parts joined."""
        url, content = self._urls["{port}" in json.dumps(body)] + path, self._encoded(body)
        answer = self._http.post(url, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200, answer.text
        if not body.get("stream"):
            whole = answer.json()
            return whole.get("choices", whole)
        *events, last = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert last == "[DONE]"
        return joined([json.loads(event) for event in events])

    def get(self, path: str) -> httpx.Response:
        return self._http.get(self._urls[False] + path)

    def close(self) -> None:
        self._http.close()

    def _encoded(self, body: Any) -> bytes:
        if isinstance(body, bytes):
            return body
        text = json.dumps(body)
        places = {"site": SITE, "other": "127.0.0.1", "port": str(self._host.port)}
        for name, value in places.items():
            text = text.replace(f"{{{name}}}", value)
        while "{fresh}" in text:
            text = text.replace("{fresh}", str(next(self._numbers)), 1)
        return text.encode()


def joined(chunks: list[dict[str, Any]]) -> dict[int, Any]:
    """For each answer of a stream, its text and how it ended."""
    texts: dict[int, str] = {}
    ends: dict[int, Any] = {}
    for choice in itertools.chain.from_iterable(chunk["choices"] for chunk in chunks):
        index = choice["index"]
        texts[index] = texts.get(index, "") + (choice["delta"]["content"] if "delta" in choice else choice["text"])
        ends[index] = choice["finish_reason"]
    return {index: (text, ends[index]) for index, text in texts.items()}


@pytest.fixture(scope="module")
def client(live: Live, guarded: Live, host: PictureHost) -> Iterator[Client]:
    client = Client(live, guarded, host)
    yield client
    client.close()


def check_answer(bad: BadInput, answer: httpx.Response) -> None:
    assert answer.status_code == bad.status, answer.text
    error = answer.json()["error"]
    message: str = error["message"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"].endswith("_error")
    assert [word for word in bad.words if word not in message] == [], message
    assert error["param"] == bad.param, message
    assert bad.code is None or error["code"] == bad.code, error
    assert 0 < len(message) <= MAX_MESSAGE, message
    assert [secret.pattern for secret in SECRETS if secret.search(answer.text)] == [], message
    assert answer.headers["content-type"] == "application/json" and answer.headers["x-request-id"]


def good_inputs() -> list[tuple[str, dict[str, Any]]]:
    """Each with an answer that is always the same."""
    same = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    seeded = {"temperature": 1.0, "seed": 5, "max_tokens": 4, "ignore_eos": True}
    text = {"type": "text", "text": "what is this?"}
    pictures = [picture_part(data_url(sound_picture(seed))) for seed in range(3)]
    fetched = picture_part("http://{site}:{port}/picture.png")
    # Its name is looked up once, and leads elsewhere from then on.
    rebinding = picture_part("http://rebinding{fresh}.example:{port}/picture.png")
    chats: list[dict[str, Any]] = [
        {"messages": HELLO},
        {"messages": [{"role": "user", "content": SPELLED}]},
        {"messages": [{"role": "system", "content": "be brief"}, *HELLO], "logprobs": True, "top_logprobs": 2},
        {"messages": HELLO, **seeded, "n": 3},
        {"messages": [{"role": "user", "content": [pictures[0], text]}]},
        {"messages": [{"role": "user", "content": [text, fetched]}]},
        {"messages": [{"role": "user", "content": [text, rebinding]}]},
        {"messages": [{"role": "user", "content": [pictures[1], text, pictures[2], fetched]}, *HELLO]},
        {"messages": [{"role": "user", "content": [pictures[2], text]}], "stop": ["e"]},
    ]
    good = [(CHAT, {**same, **chat, "stream": streams}) for chat in chats for streams in (False, True)]
    for streams in (False, True):
        good.append((COMPLETIONS, {**same, "prompt": ["one", "two words"], "echo": True, "stream": streams}))
        good.append((COMPLETIONS, {**seeded, "prompt": [[1, 5, 9], [1, 7]], "n": 2, "stream": streams}))
    return [*good, (TOKENIZE, {"prompt": "hello"})]


@dataclass
class Run:
    """One run of all requests, good and bad, in random order, several at once.

    bad: the answers to bad inputs, by name, or what kept one from coming. before, among: the answers to good inputs,
    by their numbers, before the run and in it.
    """

    bad: dict[str, Future[httpx.Response]]
    before: list[Any]
    among: list[tuple[int, Future[Any]]]


@pytest.fixture(scope="module")
def run(client: Client) -> Run:
    good = good_inputs()
    run = Run({}, [client.ask(path, body) for path, body in good], [])
    work: list[BadInput | int] = [*BAD_INPUTS, *(list(range(len(good))) * NUM_ROUNDS)]
    random.Random(SEED).shuffle(work)
    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        for one in work:
            if isinstance(one, int):
                run.among.append((one, clients.submit(client.ask, *good[one])))
            else:
                run.bad[one.name] = clients.submit(client.send, one)
    return run


@pytest.mark.parametrize("bad", [pytest.param(bad, id=bad.name) for bad in BAD_INPUTS])
def test_a_bad_input_has_its_own_answer(run: Run, bad: BadInput) -> None:
    check_answer(bad, run.bad[bad.name].result())


def test_good_answers_do_not_change_among_bad_inputs(run: Run, live: Live, guarded: Live, host: PictureHost) -> None:
    assert len(run.among) == NUM_ROUNDS * len(run.before)
    changed = [index for index, answer in run.among if answer.result() != run.before[index]]
    assert changed == [], [good_inputs()[index] for index in changed]
    check_idle(live, guarded)
    assert host.seen == [], "a server fetched from where it must not"


def test_the_table_is_large_and_names_nothing_twice() -> None:
    names = [bad.name for bad in BAD_INPUTS]
    assert len(names) == len(set(names)) >= 80
    assert all(bad.words for bad in BAD_INPUTS)


# ------------------------------------------------------------------------------------ what looks bad and is good

SPELLED = "{{ 7 * 7 }} {% raise %} {# #} <image> </s><s> <|im_end|> [INST] \x00 \u202e"


def rendered(live: Live, messages: list[Any]) -> tuple[str, list[int]]:
    return live.llm.front.chat.render_text(parse_messages(messages), ChatOptions())


def scripted(live: Live, prompt: list[int], count: int) -> str:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(checksum_token(tokens, len(tokens)))
    text: str = live.llm.get_tokenizer().decode(tokens[len(prompt) :], skip_special_tokens=True)
    return text


def test_text_that_looks_like_a_template_or_a_token_is_text(live: Live, client: Client) -> None:
    messages = [{"role": "user", "content": SPELLED}]
    text, tokens = rendered(live, messages)
    assert SPELLED in text
    spec = live.llm.front.spec
    assert spec.image_token_id not in tokens and not {*spec.eos_token_ids} & {*tokens} and tokens.count(1) == 1
    (choice,) = client.ask(CHAT, {"messages": messages, "temperature": 0, "max_tokens": 5, "ignore_eos": True})
    assert choice["message"]["content"] == scripted(live, tokens, 5)
    # The same in the client's own names for the template, and in every text of a message.
    named = client.ask(CHAT, {
        "messages": [{"role": "user", "content": SPELLED, "name": SPELLED}], "temperature": 0, "max_tokens": 5,
        "ignore_eos": True, "chat_template_kwargs": {"bos_token": SPELLED, "system": SPELLED},
    })  # fmt: skip
    assert named == [choice]


def test_what_asks_for_nothing_is_served(client: Client) -> None:
    body = {"messages": HELLO, "temperature": 0, "max_tokens": 3, "ignore_eos": True}
    plain = client.ask(CHAT, body)
    nothing = {
        "response_format": {"type": "text"}, "use_beam_search": False, "tool_choice": "none", "documents": [],
        "length_penalty": 1.0, "stop": None, "logit_bias": {}, "stop_token_ids": [], "user": "x", "model": "tiny",
        "n": 1, "seed": -1, "top_k": -1, "tools": None, "guided_json": None, "chat_template_kwargs": {},
    }  # fmt: skip
    assert client.ask(CHAT, body | nothing) == plain


def check_idle(*servers: Live) -> None:
    """Nothing is held for anybody any more, in the servers and in the engine."""
    end = time.monotonic() + 5
    while problem := next(filter(None, map(_held, servers)), None):
        assert time.monotonic() < end, problem
        time.sleep(0.01)
    for server in servers:
        assert httpx.get(f"{server.url}/health").status_code == 200


def _held(server: Live) -> str | None:
    state = server.call(server.llm.state())
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    bytes_held = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("dist_vlm:held_bytes{")}
    assert [name.split('"')[1] for name in bytes_held] == ["bodies", "arrays", "files"]
    held = bytes_held | {
        "answers": server.services.admission.num_taken, "requests": server.llm.num_unfinished,
        "running": state.num_running, "waiting": state.num_waiting, "staging": state.num_staging,
        "blocks": state.num_held_blocks, "staged pictures": state.num_staged_images,
    }  # fmt: skip
    left = {what: number for what, number in held.items() if number}
    return f"held: {left}" if left else None


def test_of_a_field_that_is_given_twice_the_last_counts(live: Live, client: Client) -> None:
    """As JSON is read in most places."""
    body = {"messages": HELLO, "temperature": 0, "max_tokens": 3, "ignore_eos": True}
    twice = b'{"n": 10, "max_tokens": "many", ' + json.dumps(body | {"n": 1}).encode()[1:]
    answer = httpx.post(live.url + CHAT, content=twice, headers={"Content-Type": "application/json"})
    assert answer.json()["choices"] == client.ask(CHAT, body)


# ------------------------------------------------------------------------------------------------- below HTTP


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"\r\n" * 100 + b"GARBAGE\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 300_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Nul: \x00\r\n\r\n",
        b'POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"m',
        b"",
    ],
)  # fmt: skip
def test_what_is_no_request_gets_an_error_or_nothing(live: Live, guarded: Live, sent: bytes) -> None:
    """The last two end in the middle, and then there is nobody to answer."""
    address = ("127.0.0.1", int(live.url.rsplit(":", 1)[1]))
    answer = b""
    # A server that has read enough may close before all is sent.
    with suppress(ConnectionError), socket.create_connection(address, timeout=5) as connection:
        connection.sendall(sent)
        with suppress(OSError):  # it is closed already
            connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(65536):
            answer += part
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 "), answer
    assert not any(secret.search(answer.decode("latin-1")) for secret in SECRETS)
    check_idle(live, guarded)
