"""What a server must refuse: each request with the status and the words of its answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
HELLO = [{"role": "user", "content": "hello"}]
MIB = 1 << 20
HUGE = 10**30


@dataclass(frozen=True, kw_only=True)
class BadInput:
    """A request and its answer.

    words: parts of the message. body: JSON data, bytes, or what makes the parts of a body. In JSON, {site} and {other}
    stand for the addresses of the picture host, {port} for its port and {fresh} for a number that is used once.
    is_guarded: whether it goes to the server that fetches from the site alone, and waits for it.
    """

    name: str
    words: tuple[str, ...]
    status: int = 400
    param: str | None = None
    code: str | None = None
    path: str = CHAT
    method: str = "POST"
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    is_guarded: bool = False


def chat(name: str, *words: str, **more: Any) -> BadInput:
    """more: fields of `BadInput`; what is none of them is a field of the body."""
    options = {key: more.pop(key) for key in BadInput.__dataclass_fields__ if key in more}
    return BadInput(name=name, words=words, body={"max_tokens": 2, "messages": HELLO, **more}, **options)


def said(name: str, messages: Any, *words: str, **more: Any) -> BadInput:
    return chat(name, *words, messages=messages, **more)


def asked(name: str, content: Any, *words: str, **more: Any) -> BadInput:
    """One message of a user."""
    return said(name, [{"role": "user", "content": content}], *words, **more)


def _raw(name: str, body: bytes | Callable[[], Iterator[bytes]], *words: str, **more: Any) -> BadInput:
    return BadInput(name=name, words=words, body=body, **more)


def valued(path: str, given: Mapping[str, Any], name: str, value: Any, words: str, **more: Any) -> BadInput:
    """A field that has a wrong value, and is blamed for it. given: the other fields."""
    shown = json.dumps(value)
    shown = shown if len(shown) < 40 else f"{shown[:20]}... ({len(shown)})"
    more = {"param": name, **more}
    return BadInput(name=f"{path[4:]} {name} = {shown}", words=(words,), path=path, body={**given, name: value}, **more)


def _one_of_json(text: str) -> bytes:
    """A body, whole but for one value."""
    return b'{"messages": [{"role": "user", "content": "hello"}], ' + text.encode() + b"}"


def _slowly() -> Iterator[bytes]:
    yield b'{"messages": '
    time.sleep(1.4)
    yield b"[]}"


def _megabytes(count: int) -> Iterator[bytes]:
    """White space, which is JSON as far as it goes."""
    part = b" " * MIB
    for _ in range(count):
        yield part


_NO_JSON = (
    _raw("nothing", b"", "line 1, column 1", code="malformed_json"),
    _raw("a word", b"hello", "line 1, column 1", code="malformed_json"),
    _raw("an object that does not end", b'{"messages": [', "line 1, column 15", code="malformed_json"),
    _raw("a comma too much", b'{"max_tokens": 1,}', "column 18", code="malformed_json"),
    _raw("single quotes", b"{'max_tokens': 1}", "column 2", code="malformed_json"),
    _raw("two objects", b"{}\n{}", "line 2, column 1", code="malformed_json"),
    _raw("a byte order mark", b"\xef\xbb\xbf{}", "not JSON", code="malformed_json"),
    _raw("UTF-16", '{"max_tokens": 1}'.encode("utf-16"), "not UTF-8", code="malformed_json"),
    _raw("bytes that are no UTF-8", _one_of_json('"user": "\xff"').decode().encode("latin-1"), "not UTF-8"),
    _raw("a control character", b'{"user": "\x01"}', "column 11", code="malformed_json"),
    _raw("NaN", _one_of_json('"temperature": NaN'), "NaN is no JSON number", code="malformed_json"),
    _raw("infinity", _one_of_json('"temperature": -Infinity'), "-Infinity is no JSON number"),
    _raw("1e999", _one_of_json('"temperature": 1e999'), "1e999", "too large a number"),
    _raw("5000 digits", _one_of_json('"n": ' + "9" * 5000), "a number of too many digits"),
    _raw("nested 100 000 times", b'{"messages":' + b"[" * 99_999, "nested too deeply", code="malformed_json"),
    _raw("lists without end", b"[" * 500_000, "too many lists and objects", code="too_many_values"),
    _raw("values without end", b"[" + b"1," * 1_500_000 + b"1]", "too many values", code="too_many_values"),
    _raw("a list", b"[]", "the body is a list: must be a JSON object", code="not_an_object"),
    _raw("null", b"null", "the body is null: must be a JSON object", code="not_an_object"),
    _raw("a string", b'"hello"', "the body is a string", code="not_an_object"),
    _raw("a number", b"1", "the body is a number", code="not_an_object"),
    _raw("no messages", b"{}", "messages is missing", param="messages", code="missing_field"),
)

_NOT_HTTP_AS_SERVED = (
    _raw("text/plain", b"{}", "Content-Type = 'text/plain'", status=415, headers={"Content-Type": "text/plain"}),
    _raw("a form", b"a=1", "must be application/json", status=415, code="not_json",
         headers={"Content-Type": "application/x-www-form-urlencoded"}),
    _raw("no content type", b"{}", "Content-Type = ''", status=415, headers={"Content-Type": ""}),
    _raw("a compressed body", b"\x1f\x8b\x08", "not UTF-8", headers={"Content-Encoding": "gzip"}),
    BadInput(name="GET of a chat", words=("GET is not served",), status=405, method="GET"),
    BadInput(name="DELETE of a chat", words=("DELETE is not served",), status=405, method="DELETE"),
    BadInput(name="PUT of tokens", words=("PUT is not served",), status=405, method="PUT", path=TOKENIZE),
    BadInput(name="PATCH of a chat", words=("PATCH is not served",), status=405, method="PATCH"),
    BadInput(name="POST of the health", words=("POST is not served",), status=405, path="/health"),
    BadInput(name="embeddings", words=("nothing at this path",), status=404, path="/v1/embeddings", body={}),
    BadInput(name="a path with a slash more", words=("nothing at this path",), status=404, path=CHAT + "/", body={}),
    BadInput(name="a way out", words=("nothing at this path",), status=404, method="GET", path="/%2e%2e/etc/passwd"),
    BadInput(name="no file beside the page", words=("nothing at this path",), status=404, method="GET",
             path="/..%2f..%2fserver%2fapp.py"),
    BadInput(name="a model's card that is none", words=("'x/../tiny'", "is not served here"), status=404,
             method="GET", path="/v1/models/x%2F..%2Ftiny", param="model", code="model_not_found"),
    _raw("100 MB", lambda: _megabytes(100), "the body is longer than 4194304 bytes", status=413,
         code="body_too_large", headers={"Content-Length": str(100 * MIB)}),
    _raw("100 MB in chunks", lambda: _megabytes(100), "the body is longer than 4194304 bytes", status=413,
         code="body_too_large"),
    _raw("a body that comes slowly", _slowly, "not sent within 1 s", status=408, code="body_timeout",
         is_guarded=True),
    _raw("a byte too much", b" " * (4 * MIB + 1), "the body is longer than 4194304 bytes", status=413),
)  # fmt: skip

_MESSAGES = (
    said("no message", [], "at least one", param="messages"),
    said("messages in a string", "hello", "must be a list", param="messages"),
    said("messages that are null", None, "must be a list", param="messages"),
    said("messages in an object", {"role": "user"}, "must be a list", param="messages"),
    said("a message that is a string", ["hello"], "must be a JSON object", param="messages[0]"),
    said("the 10 001st message", HELLO * 10_001, "at most 10000", param="messages"),
    said("no role", [{"content": "x"}], "must be one of system", param="messages[0].role"),
    said("an unknown role", [{"role": "root", "content": "x"}], "'root'", param="messages[0].role"),
    said("a role in capitals", [{"role": "User", "content": "x"}], "'User'", param="messages[0].role"),
    said("a role that is a list", [{"role": ["user"], "content": "x"}], "must be one of", param="messages[0].role"),
    said("a role nested 900 times", [{"role": json.loads("[" * 900 + "]" * 900)}], "must be one of",
         param="messages[0].role"),
    said("an unknown key", [{"role": "user", "content": "x", "weight": 1}], "'weight'", param="messages[0]"),
    said("no content", [*HELLO, {"role": "user"}], "has no content", param="messages[1]"),
    asked("content that is null", None, "has no content", param="messages[0]"),
    asked("content that is a number", 5, "of type int: must be a string", param="messages[0].content"),
    asked("content that is an object", {"text": "x"}, "must be a string", param="messages[0].content"),
    asked("no part", [], "have at least one part", param="messages[0].content"),
    asked("a part that is a string", ["x"], "must be a map with a type", param="messages[0].content[0]"),
    asked("a part without a type", [{"text": "x"}], "must be one of text", param="messages[0].content[0].type"),
    asked("an unknown part", [{"type": "video_url"}], "'video_url'", param="messages[0].content[0].type"),
    asked("a part of audio", [{"type": "input_audio", "input_audio": {}}], "'input_audio'",
          param="messages[0].content[0].type"),
    asked("a text that is none", [{"type": "text", "text": 5}], "must be a string",
          param="messages[0].content[0].text"),
    asked("half a surrogate pair", "\ud83d", "half of a surrogate pair", param="messages[0].content"),
    asked("half a pair in a part", [{"type": "text", "text": "\ude00"}], "half of a surrogate pair",
          param="messages[0].content[0].text"),
    said("a name that is none", [{"role": "user", "content": "x", "name": 5}], "must be a string",
         param="messages[0].name"),
    said("a tool call without a name", [{"role": "assistant", "tool_calls": [{}]}], "must name its function",
         param="messages[0].tool_calls[0].function.name"),
    said("a tool call's arguments",
         [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
         "must be JSON", param="messages[0].tool_calls[0].function.arguments"),
    said("arguments nested 500 times",
         [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 500 + "]" * 500}}]}],
         "nested deeper than 64 levels", param=("messages[0].tool_calls[0].function.arguments" + "[0]" * 65)[:120]),
    asked("a prompt that is too long", "word " * 600, "tokens long", "at most 511"),
    asked("a prompt of 3 MB", "x" * 3_000_000, "characters of text", "at most 32768", param="messages"),
    asked("1500 parts", [{"type": "text", "text": "x"}] * 1500, "tokens long"),
)  # fmt: skip

_COMPLETIONS = tuple(
    valued(COMPLETIONS, {"max_tokens": 2}, "prompt", value, words, param=param)
    for value, words, param in (
        ("", "must have at least one character", "prompt"),
        (None, "must be a string", "prompt"),
        (5, "must be a string", "prompt"),
        ([], "at least one prompt", None),
        (["x", 5], "must be a string, array", "prompt"),
        ([1, True], "must be a string, array", "prompt"),
        ([1.5], "must be a string, array", "prompt"),
        ([[]], "must be a string, array", "prompt"),
        ([None], "must be a string, array", "prompt"),
        ([["x"]], "must be integers", "prompt"),
        ([[1], [[2]]], "must be integers", "prompt"),
        ([-1], "must be in 0 .. 32063", "prompt"),
        ([32064], "must be in 0 .. 32063", "prompt"),
        ([HUGE], "must be in 0 .. 32063", "prompt"),
        ([10**3000], "must be in 0 .. 32063", "prompt"),
        ([1] * 600, "at most 511", None),
        ([1] * 40_000, "40000 entries", "prompt"),
        ("x" * 40_000, "40000 characters", "prompt"),
        ("\ud800", "half of a surrogate pair", "prompt"),
        ([32000], "has no image", None),
        ("<image>", "has no image", None),
    )
) + (
    BadInput(name="the last prompt of a stream is empty", words=("at least one character",), param="prompt",
             path=COMPLETIONS, body={"prompt": [*(["x"] * 20), ""], "stream": True}),
    BadInput(name="the last prompt of several is too long", words=("tokens long",), path=COMPLETIONS,
             body={"prompt": [[1], [5] * 512], "stream": True}),
    BadInput(name="no prompt", words=("prompt is missing",), param="prompt", path=COMPLETIONS, body={}),
    BadInput(name="265 prompts", words=("265 answers", "at most 264"), path=COMPLETIONS, param="n",
             code="too_many_answers", body={"prompt": ["x"] * 265}),
    BadInput(name="a suffix", words=("suffix",), param="suffix", path=COMPLETIONS, body={"prompt": "x", "suffix": "y"}),
    BadInput(name="a truth value for log probabilities", words=("must be an integer",), param="logprobs",
             path=COMPLETIONS, body={"prompt": "x", "logprobs": True}),
    BadInput(name="21 log probabilities", words=("at most max_logprobs = 20",), param="logprobs", path=COMPLETIONS,
             body={"prompt": "x", "logprobs": 21}),
    BadInput(name="a cut to nothing", words=("at least 1",), param="truncate_prompt_tokens", path=COMPLETIONS,
             body={"prompt": "x", "truncate_prompt_tokens": 0}),
    BadInput(name="pictures in a completion", words=("'multi_modal_data' is no field",), param="multi_modal_data",
             path=COMPLETIONS, body={"prompt": "<image>", "multi_modal_data": {"image": "x"}}),
)  # fmt: skip

_TOKENS = (
    BadInput(name="neither prompt nor messages", words=("exactly one",), path=TOKENIZE, body={}),
    BadInput(name="both prompt and messages", words=("exactly one",), path=TOKENIZE,
             body={"prompt": "x", "messages": HELLO}),
    BadInput(name="half a pair to tokenize", words=("half of a surrogate pair",), param="prompt", path=TOKENIZE,
             body={"prompt": "\ud800"}),
    BadInput(name="a long text to tokenize", words=("at most 32768",), param="prompt", path=TOKENIZE,
             body={"prompt": "x" * 40_000}),
    BadInput(name="an unknown role to tokenize", words=("'root'",), param="messages[0].role", path=TOKENIZE,
             body={"messages": [{"role": "root", "content": "x"}]}),
    BadInput(name="no message to tokenize", words=("at least one",), param="messages", path=TOKENIZE,
             body={"messages": []}),
    BadInput(name="no tokens", words=("tokens is missing",), param="tokens", path=DETOKENIZE, body={}),
    BadInput(name="tokens in a string", words=("must be a list",), param="tokens", path=DETOKENIZE,
             body={"tokens": "1"}),
    BadInput(name="a token that is true", words=("must be an integer",), param="tokens[0]", path=DETOKENIZE,
             body={"tokens": [True]}),
    BadInput(name="a token below 0", words=("must be in 0 .. 32063",), param="tokens", path=DETOKENIZE,
             body={"tokens": [1, -1]}),
    BadInput(name="a token of 31 digits", words=("must be in 0 .. 32063",), param="tokens", path=DETOKENIZE,
             body={"tokens": [HUGE]}),
    BadInput(name="a token of 3001 digits", words=("must be in 0 .. 32063",), param="tokens", path=DETOKENIZE,
             body={"tokens": [10**3000]}),
    BadInput(name="40 000 tokens", words=("40000 entries",), param="tokens", path=DETOKENIZE,
             body={"tokens": [1] * 40_000}),
)  # fmt: skip

BODY_INPUTS = (*_NO_JSON, *_NOT_HTTP_AS_SERVED, *_MESSAGES, *_COMPLETIONS, *_TOKENS)
