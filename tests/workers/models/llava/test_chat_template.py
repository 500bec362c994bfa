"""The family's own chat template, through transformers, against what the published checkpoints' template writes."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dist_vlm.workers.models import get_family

DEMO = "examples/demo/checkpoint"
IMAGE = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def turn(role: str, *content: Any) -> dict[str, Any]:
    return {"role": role, "content": content[0] if isinstance(content[0], str) else list(content)}


CONVERSATIONS = {
    "USER: <image>\nWhat is it? ASSISTANT:": [turn("user", IMAGE, text("What is it?"))],
    "USER: <image>\nWhat  is it? ASSISTANT:": [turn("user", text("What  is it?"), IMAGE)],
    "USER: <image>\n<image>\nFirst? Second? ASSISTANT:": [
        turn("user", text("First?"), IMAGE, text("Second?"), IMAGE)
    ],
    "USER: Hello ASSISTANT:": [turn("user", "Hello")],
    "USER: <image>\nASSISTANT:": [turn("user", IMAGE)],
    "Be short. USER: <image>\nA cat? ASSISTANT: yes USER: <image>\nAnd here?\nReally? ASSISTANT:": [
        turn("system", "Be short."),
        turn("user", IMAGE, text("A cat?")),
        turn("assistant", text("yes")),
        turn("user", IMAGE, text("And here?\nReally?")),
    ],
    "Be short. USER: Hi ASSISTANT: yo USER: é☃<b> ASSISTANT:": [
        turn("system", text("Be short.")),
        turn("user", "Hi"),
        turn("assistant", "yo"),
        turn("user", "é☃<b>"),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(DEMO)


def rendered(tokenizer: PreTrainedTokenizerFast, template: str, messages: Any, *, prompted: bool = True) -> str:
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=prompted
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("expected", CONVERSATIONS)
def test_it_writes_what_the_published_one_writes(tokenizer: PreTrainedTokenizerFast, expected: str) -> None:
    template = get_family("llava").chat_template
    assert template is not None
    messages = CONVERSATIONS[expected]
    assert rendered(tokenizer, template, messages) == expected
    assert rendered(tokenizer, template, messages, prompted=False) == expected.removesuffix("ASSISTANT:")
    # The demo checkpoint was trained on the published one's form.
    assert rendered(tokenizer, str(tokenizer.chat_template), messages) == expected


def test_a_developers_message_is_the_systems(tokenizer: PreTrainedTokenizerFast) -> None:
    template = str(get_family("llava").chat_template)
    messages = [turn("developer", "Be short."), turn("user", "Hi")]
    assert rendered(tokenizer, template, messages) == "Be short. USER: Hi ASSISTANT:"


def test_a_family_need_not_have_one() -> None:
    from dist_vlm.workers.models.family import ModelFamily

    assert ModelFamily.chat_template.fget(get_family("llava")) is None  # type: ignore[attr-defined]
