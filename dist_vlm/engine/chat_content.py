"""Messages as a client writes them, checked: what is text, what is a picture, and in which order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dist_vlm.media import PictureError
from dist_vlm.media.picture_source import open_data_url

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_KEYS = frozenset({"reasoning_content", "reasoning"})
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", *sorted(REASONING_KEYS))
# The parts of a content, with the key that holds what each is.
_PARTS = {"text": "text", "image_url": "image_url", "image": "image"}
_DETAILS = ("auto", "low", "high")
_MAX_DEPTH = 64
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class Picture:
    """source: a PIL picture, or a URL: data:, and http: or https: where those are fetched. name: where it stands in
    the messages."""

    source: Image.Image | str
    name: str

    @property
    def is_remote(self) -> bool:
        """Whether it must be fetched first."""
        return isinstance(self.source, str) and not _is_data(self.source)

    def open(self, *, max_pixels: int) -> Image.Image:
        """Not decoded yet. Raises `PictureError`."""
        if isinstance(self.source, Image.Image):
            return self.source
        if self.is_remote:
            raise PictureError(f"{self.name}.url = {_short(self.source)}: was not fetched")
        return open_data_url(self.source, name=self.name, max_pixels=max_pixels)


@dataclass(frozen=True, slots=True)
class Message:
    """content: a text, or texts and pictures in their order; None where the message has none (a call of tools).
    fields: everything else, in JSON's types, without what was None; `arguments` of tool calls are parsed."""

    content: str | tuple[str | Picture, ...] | None
    fields: dict[str, Any]

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.content if isinstance(part, Picture)] if isinstance(self.content, tuple) else []

    @property
    def content_texts(self) -> list[str]:
        """The texts of its content."""
        parts = self.content if isinstance(self.content, tuple) else (self.content,)
        return [part for part in parts if isinstance(part, str)]

    @property
    def texts(self) -> list[str]:
        """Every text that a client wrote in it."""
        return [*self.content_texts, *texts_of(self.fields)]


def parse_messages(messages: Any, *, fetches: bool = False) -> tuple[Message, ...]:
    """One conversation in OpenAI's form. A key whose value is None counts as absent.

    fetches: whether the caller fetches pictures by their http: and https: URLs; without, those are refused.

    A content is a string or a list of parts: {"type": "text", "text": ...}, {"type": "image_url", "image_url":
    {"url": "data:image/...;base64,..."}} (a `detail` beside the url has no effect: the model decides how a picture is
    scaled), or {"type": "image", "image": a PIL picture}.

    Raises `ValueError` naming the message, the part, the value and what is allowed.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise ValueError(f"messages of type {type(messages).__name__}: must be a list of messages")
    if not messages:
        raise ValueError("messages is empty: must have at least one message")
    return tuple(_message(message, f"messages[{index}]", fetches) for index, message in enumerate(messages))


def plain_json(value: Any, where: str, *, depth: int = 0) -> Any:
    """A copy in JSON's own types, its texts checked. Raises `ValueError` naming the place of what is none of them."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where}: nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, str):
        return _text(value, where)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {_short(key)}: must be a string")
            _text(key, where)
        return {key: plain_json(item, f"{where}.{key}", depth=depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item, f"{where}[{index}]", depth=depth + 1) for index, item in enumerate(value)]
    raise ValueError(f"{where} of type {type(value).__name__}: must be one of JSON's types")


def texts_of(value: Any) -> Iterator[str]:
    """Every text in JSON data, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)


def _message(message: Any, where: str, fetches: bool) -> Message:
    given = _present(message, where, _KEYS)
    role = given.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}.role = {_short(role)}: must be one of {', '.join(ROLES)}")
    content = given.pop("content", None)
    fields = plain_json({key: value for key, value in given.items() if key != "tool_calls"}, where)
    for key in fields:
        if not isinstance(fields[key], str):
            raise ValueError(f"{where}.{key} = {_short(fields[key])}: must be a string")
    if "tool_calls" in given:
        fields["tool_calls"] = _tool_calls(given["tool_calls"], f"{where}.tool_calls")
    if content is None:
        if not fields.get("tool_calls"):
            raise ValueError(f"{where} has no content: only a message with tool_calls may be without")
        return Message(None, fields)
    return Message(_content(content, f"{where}.content", fetches), fields)


def _content(content: Any, where: str, fetches: bool) -> str | tuple[str | Picture, ...]:
    if isinstance(content, str):
        return _text(content, where)
    if not isinstance(content, Sequence):
        raise ValueError(f"{where} of type {type(content).__name__}: must be a string or a list of parts")
    if not content:
        raise ValueError(f"{where} is an empty list: must be a string or have at least one part")
    return tuple(_part(part, f"{where}[{index}]", fetches) for index, part in enumerate(content))


def _part(part: Any, where: str, fetches: bool) -> str | Picture:
    if not isinstance(part, Mapping):
        raise ValueError(f"{where} of type {type(part).__name__}: must be a map with a type")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _PARTS:
        raise ValueError(f"{where}.type = {_short(kind)}: must be one of {', '.join(_PARTS)}")
    key = _PARTS[kind]
    value = _present(part, where, ("type", key)).get(key)
    if key == "text":
        if not isinstance(value, str):
            raise ValueError(f"{where}.text of type {type(value).__name__}: must be a string")
        return _text(value, f"{where}.text")
    if key == "image":
        if not isinstance(value, Image.Image):
            raise ValueError(f"{where}.image of type {type(value).__name__}: must be a PIL picture")
        return Picture(value, where)
    return Picture(_url(value, f"{where}.image_url", fetches), where)


def _url(image_url: Any, where: str, fetches: bool) -> str:
    given = _present(image_url, where, ("url", "detail"))
    url, detail = given.get("url"), given.get("detail", "auto")
    if detail not in _DETAILS:
        raise ValueError(f"{where}.detail = {_short(detail)}: must be one of {', '.join(_DETAILS)}")
    if not isinstance(url, str):
        raise ValueError(f"{where}.url of type {type(url).__name__}: must be a string")
    if _is_data(url):
        return url
    if url[:6].lower().startswith(("http:", "https:")):
        if fetches:
            return url
        raise PictureError(f"{where}.url = {_short(url)}: is not fetched here; give the picture as a data: URL")
    forms = "a data: URL or by http(s)" if fetches else "a data: URL"
    raise PictureError(f"{where}.url = {_short(url)}: files are not read; give the picture as {forms}")


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"


def _tool_calls(calls: Any, where: str) -> list[Any]:
    checked = plain_json(calls, where)
    if not isinstance(checked, list):
        raise ValueError(f"{where} of type {type(calls).__name__}: must be a list")
    for index, call in enumerate(checked):
        here = f"{where}[{index}].function"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{here}.name is missing: a call must name its function")
        function["arguments"] = _arguments(function.get("arguments", {}), f"{here}.arguments")
    return checked


def _arguments(value: Any, where: str) -> dict[str, Any]:
    """Templates expect a map; OpenAI's form has its JSON text."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, or nested without end
            raise ValueError(f"{where} = {_short(value)}: must be JSON") from None
        value = plain_json(parsed, where)
    if not isinstance(value, dict):
        raise ValueError(f"{where} = {_short(value)}: must be a JSON object")
    return value


def _present(value: Any, where: str, allowed: Sequence[str]) -> dict[str, Any]:
    """The keys of a map whose values are not None, all of them allowed."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} of type {type(value).__name__}: must be a map with {', '.join(allowed)}")
    present = {key: item for key, item in value.items() if item is not None}
    for key in present:
        if key not in allowed:
            raise ValueError(f"{where} has the key {_short(key)}: allowed are {', '.join(allowed)}")
    return present


def _text(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds {text[error.start]!r}, half of a surrogate pair: not text") from None
    return text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."
