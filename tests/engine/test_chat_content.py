from __future__ import annotations

import re

import pytest
from PIL import Image

from dist_vlm.engine.chat_content import Message, Picture, parse_messages, plain_json

PICTURE = Image.new("RGB", (2, 2))
DATA = "data:image/png;base64,AAAA"
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, "a"]}'}}


def user(content):
    return [{"role": "user", "content": content}]


def test_texts_and_pictures_keep_their_order():
    content = [
        {"type": "text", "text": "a"},
        {"type": "image", "image": PICTURE},
        {"type": "image_url", "image_url": {"url": DATA, "detail": "high"}},
        {"type": "text", "text": ""},
    ]
    (message,) = parse_messages(user(content))
    first, second = Picture(PICTURE, "messages[0].content[1]"), Picture(DATA, "messages[0].content[2]")
    assert message.content == ("a", first, second, "")
    assert message.pictures == [first, second]


def test_a_conversation_with_tools():
    messages = [
        {"role": "system", "content": "s"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "r", "image": None}]},
        {"role": "assistant", "content": "x", "reasoning_content": "why"},
    ]
    system, call, result, answer = parse_messages(messages)
    assert system == Message("s", {"role": "system"})
    assert call.content is None
    assert call.fields["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": [1, "a"]}}
    assert CALL["function"]["arguments"] == '{"x": [1, "a"]}', "the caller's own is untouched"
    assert result == Message(("r",), {"role": "tool", "tool_call_id": "c1"})
    assert set(answer.texts) >= {"x", "why", "reasoning_content"}
    assert set(call.texts) >= {"f", "x", "a", "c1"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "messages of type NoneType: must be a list"),
        ("hi", "messages of type str"),
        ([], "messages is empty"),
        (["hi"], "messages[0] of type str: must be a map with role, content"),
        ([{"role": "user"}], "messages[0] has no content"),
        ([{"content": "x"}], "messages[0].role = None: must be one of system, developer, user, assistant, tool"),
        ([{"role": "bot", "content": "x"}], "messages[0].role = 'bot'"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role = ['user']"),
        ([*user("a"), {"role": "user", "content": "x", "colour": 1}], "messages[1] has the key 'colour': allowed are"),
        ([{"role": "user", "content": "x", "name": 3}], "messages[0].name = 3: must be a string"),
        (user(3), "messages[0].content of type int"),
        (user([]), "messages[0].content is an empty list"),
        (user(["x"]), "messages[0].content[0] of type str: must be a map"),
        (
            user([{"type": "text", "text": "a"}, {"text": "b"}]),
            "content[1].type = None: must be one of text",
        ),
        (
            user([{"type": "video", "video": "a.mp4"}]),
            "[0].type = 'video': must be one of text, image_url, image",
        ),
        (user([{"type": "text", "text": 5}]), "content[0].text of type int: must be a string"),
        (user([{"type": "text"}]), "content[0].text of type NoneType"),
        (user([{"type": "text", "text": "a", "url": "b"}]), "content[0] has the key 'url': allowed are type, text"),
        (user([{"type": "image", "image": "a.png"}]), "content[0].image of type str: must be a PIL picture"),
        (user([{"type": "image_url", "image_url": DATA}]), "image_url of type str: must be a map with url, detail"),
        (user([{"type": "image_url", "image_url": {"url": 5}}]), "content[0].image_url.url of type int"),
        (
            user([{"type": "image_url", "image_url": {"url": DATA, "detail": "huge"}}]),
            "detail = 'huge': must be one of auto, low, high",
        ),
        (
            user([{"type": "image_url", "image_url": {"url": "https://a/b.png"}}]),
            "image_url.url = 'https://a/b.png': is not fetched here; give the picture as a data: URL",
        ),
        (user([{"type": "image_url", "image_url": {"url": "HTTP://a/b.png"}}]), "is not fetched here"),
        (user([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]), "files are not read"),
        (user([{"type": "image_url", "image_url": {"url": "a.png"}}]), "files are not read"),
        (user("half \ud83d"), "messages[0].content holds '\\ud83d', half of a surrogate pair"),
        (user([{"type": "text", "text": "\udc00"}]), "content[0].text holds '\\udc00'"),
        ([{"role": "assistant", "tool_calls": {}}], "tool_calls of type dict: must be a list"),
        ([{"role": "assistant", "tool_calls": [{"id": "a"}]}], "tool_calls[0].function.name is missing"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}],
            "tool_calls[0].function.arguments = '{x': must be JSON",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
            "arguments = [1]: must be a JSON object",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 100_000}}]}],
            "must be JSON",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "\\ud83d"}'}}]}],
            "arguments.a holds '\\ud83d'",
        ),
        ([{"role": "assistant", "tool_calls": []}], "messages[0] has no content"),
    ],
)
def test_a_wrong_message_is_named(messages, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_messages(messages)


def test_a_message_does_not_repeat_a_long_value():
    with pytest.raises(ValueError) as error:  # noqa: PT011
        parse_messages(user([{"type": "image_url", "image_url": {"url": "ftp://" + "x" * 10**6}}]))
    assert len(str(error.value)) < 300


def test_json_data_is_copied_and_bounded():
    value = {"a": [1, 2.5, True, None, {"b": "c"}]}
    copy = plain_json(value, "it")
    assert copy == value
    assert copy["a"] is not value["a"]
    deep = []
    for _ in range(100):
        deep = [deep]
    for wrong, message in [
        ({1: 2}, "it has the key 1: must be a string"),
        ({"a": {"b": object()}}, "it.a.b of type object"),
        (deep, "nested deeper than 64"),
        ({"\ud800": 1}, "half of a surrogate"),
    ]:
        with pytest.raises(ValueError, match=message):
            plain_json(wrong, "it")
