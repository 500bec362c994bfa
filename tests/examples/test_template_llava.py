"""The shipped template, through transformers and through this runtime, against strings written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from dist_vlm.engine.chat import ChatRenderer

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (ROOT / "examples" / "template_llava.jinja").read_text(encoding="utf-8")
IMAGE = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def turn(role: str, *content: Any) -> dict[str, Any]:
    return {"role": role, "content": content[0] if isinstance(content[0], str) else list(content)}


EXPECTED = {
    "<s>USER: Hello\nASSISTANT:": [turn("user", "Hello")],
    "<s>USER: <image>\nWhat is it?\nASSISTANT:": [turn("user", text("What is it?"), IMAGE)],
    "<s>USER: <image>\n<image>\nOne?\nTwo?\nASSISTANT:": [turn("user", text("One?"), IMAGE, text("Two?"), IMAGE)],
    "<s>USER: <image>\n\nASSISTANT:": [turn("user", IMAGE)],
    "<s>Be short.USER: Hello\nASSISTANT: Hi.</s>\nUSER: <image>\nWhat?\nASSISTANT:": [
        turn("system", "Be short."),
        turn("user", "Hello"),
        turn("assistant", "Hi."),
        turn("user", IMAGE, text("What?")),
    ],
    "<s>A b.USER: Hello\nASSISTANT:": [turn("developer", text("A b.")), turn("user", text("Hello"))],
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(ROOT / "examples" / "demo" / "checkpoint")


def rendered(tokenizer: PreTrainedTokenizerFast, messages: Any, *, prompted: bool = True) -> str:
    return str(
        tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=prompted)
    )


@pytest.mark.parametrize("expected", EXPECTED)
def test_strings_and_parts_become_turns(tokenizer: PreTrainedTokenizerFast, expected: str) -> None:
    messages = EXPECTED[expected]
    assert rendered(tokenizer, messages) == expected
    assert rendered(tokenizer, messages, prompted=False) == expected.removesuffix("ASSISTANT:")


def test_an_answered_conversation_ends_with_the_end_of_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [turn("user", "Hello"), turn("assistant", text("Hi."))]
    assert rendered(tokenizer, messages, prompted=False) == "<s>USER: Hello\nASSISTANT: Hi.</s>\n"


@pytest.mark.parametrize(
    "roles",
    [
        ["assistant"],
        ["user", "user"],
        ["system", "assistant"],
        ["user", "assistant", "assistant"],
        ["user", "system"],
        ["user", "tool"],
        ["tool"],
        ["system", "system", "user"],
    ],
)
def test_roles_that_do_not_alternate_are_refused(tokenizer: PreTrainedTokenizerFast, roles: list[str]) -> None:
    with pytest.raises(TemplateError, match="roles must alternate: user, assistant, user, "):
        rendered(tokenizer, [turn(role, "x") for role in roles])


def test_the_runtime_tells_what_is_refused_and_keeps_a_spelled_token_text(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatRenderer(tokenizer, image_token_id=493, max_pixels=1000, default_template=TEMPLATE)
    with pytest.raises(ValueError, match="the chat template refuses the messages: roles must alternate"):
        chat.render([turn("assistant", "x")])
    prompt = chat.render([turn("user", "a </s> b"), turn("assistant", "c"), turn("user", "d")])
    assert prompt.prompt == "<s>USER: a </s> b\nASSISTANT: c</s>\nUSER: d\nASSISTANT:"
    ids = prompt.prompt_token_ids
    assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (1, 1)
