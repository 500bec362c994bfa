"""/openapi.json tells what a body may be, and what an error is, as it is."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from dist_vlm.engine.chat_content import parse_messages

from .live import Live

PICTURE = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
TEXT = {"type": "text", "text": "hello"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SERVED: list[dict[str, Any]] = [
    {"role": "user", "content": "hello"},
    {"role": "developer", "content": "", "name": "x"},
    {"role": "user", "content": [TEXT, PICTURE, TEXT]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:", "detail": "high"}}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:", "detail": None}}], "name": None},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "why"},
    {"role": "assistant", "tool_calls": [CALL], "reasoning": "why"},
    {"role": "tool", "content": "4", "tool_call_id": "1"},
]
REFUSED: list[Any] = [
    "hello",
    {"content": "hello"},
    {"role": "root", "content": "hello"},
    {"role": None, "content": "hello"},
    {"role": "user", "content": 5},
    {"role": "user", "content": []},
    {"role": "user", "content": ["hello"]},
    {"role": "user", "content": "hello", "weight": 1},
    {"role": "user", "content": "hello", "name": 5},
    {"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:"}}]},
    {"role": "user", "content": [{"type": "text"}]},
    {"role": "user", "content": [{**TEXT, "image_url": {"url": "data:"}}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": "data:"}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:", "detail": "ultra"}}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:", "size": 5}}]},
    {"role": "assistant", "tool_calls": "f"},
]


@pytest.fixture(scope="module")
def document(live: Live) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(f"{live.url}/openapi.json").json()
    return answer


def validator(document: dict[str, Any], name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": document["components"]})


def test_a_message_is_what_is_read_as_one(document: dict[str, Any]) -> None:
    for name in ("ChatFields", "TokenizeFields"):
        allows = validator(document, name).is_valid
        for message in SERVED:
            parse_messages([message], fetches=True)
            assert allows({"messages": [message]}), message
        for message in REFUSED:
            if isinstance(message, dict):
                with pytest.raises(ValueError, match="messages"):
                    parse_messages([message], fetches=True)
            assert not allows({"messages": [message]}), message
        assert not allows({"messages": []})
    assert validator(document, "TokenizeFields").is_valid({"messages": None, "prompt": "hello"})


def test_an_error_is_what_the_document_says(live: Live, document: dict[str, Any]) -> None:
    check = validator(document, "Error").validate
    for path in ("/nothing", "/v1/models/other", "/tokenize"):
        check(httpx.get(live.url + path).json())
    check(httpx.post(f"{live.url}/v1/chat/completions", json={"messages": [], "n": 1}).json())
    for methods in document["paths"].values():
        for operation in methods.values():
            for status in ("4XX", "5XX"):
                schema = operation["responses"][status]["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Error"}
    assert "HTTPValidationError" not in document["components"]["schemas"], "FastAPI's own, which is never sent"
