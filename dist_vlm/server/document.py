"""What /openapi.json says beyond what follows from the routes: bodies, which are read by ourselves, and errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from dist_vlm.engine.chat_content import ROLES
from dist_vlm.server.fields import ChatFields, CompletionFields, DetokenizeFields, Fields, TokenizeFields

_REFS = "#/components/schemas/{model}"
_BODIES = (ChatFields, CompletionFields, TokenizeFields, DetokenizeFields)

_NULL = {"type": "null"}
_TEXT = {"type": "string"}


def error_responses() -> dict[int | str, dict[str, Any]]:
    """Of every route."""
    content = {"application/json": {"schema": {"$ref": _REFS.format(model="Error")}}}
    return {
        "4XX": {"description": "The request is refused; the message says why", "content": content},
        "5XX": {"description": "The server fails, or serves no more", "content": content},
    }


def body_of_kind(kind: type[Fields]) -> dict[str, Any]:
    """A route's `requestBody`."""
    schema = {"$ref": _REFS.format(model=kind.__name__)}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def describe(app: FastAPI) -> None:
    """To be called once, when all routes are there."""
    document = app.openapi()
    _, defined = models_json_schema([(kind, "validation") for kind in _BODIES], ref_template=_REFS)
    schemas: dict[str, Any] = defined["$defs"] | {"Error": _ERROR, "Message": _MESSAGE}
    messages = {"type": "array", "items": {"$ref": _REFS.format(model="Message")}, "minItems": 1}
    schemas["ChatFields"]["properties"]["messages"] |= messages
    schemas["TokenizeFields"]["properties"]["messages"] |= {"anyOf": [messages, _NULL]}
    document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    """A key that is not required may be null."""
    known = {name: one if name in required else {"anyOf": [one, _NULL]} for name, one in properties.items()}
    return {"type": "object", "properties": known, "required": list(required), "additionalProperties": False}


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"anyOf": [_TEXT, _NULL], "description": "the field to blame"},
                "code": {"anyOf": [_TEXT, _NULL], "description": "a word for programs"},
            },
        }
    },
}
_IMAGE_URL = _object(
    {
        "url": {"type": "string", "description": "data:image/...;base64,... or, where it is fetched, http(s)"},
        "detail": {"enum": ["auto", "low", "high"], "description": "has no effect"},
    },
    "url",
)
_PARTS = [
    _object({"type": {"const": "text"}, "text": _TEXT}, "type", "text"),
    _object({"type": {"const": "image_url"}, "image_url": _IMAGE_URL}, "type", "image_url"),
]
_MESSAGE = _object(
    {
        "role": {"enum": list(ROLES)},
        "content": {"anyOf": [_TEXT, {"type": "array", "items": {"anyOf": _PARTS}, "minItems": 1}]},
        "name": _TEXT,
        "tool_calls": {"type": "array", "items": {"type": "object"}},
        "tool_call_id": _TEXT,
        "reasoning": _TEXT,
        "reasoning_content": _TEXT,
    },
    "role",
)
