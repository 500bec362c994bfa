from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from dist_vlm.config import EngineConfig, resolve
from dist_vlm.engine import front
from dist_vlm.engine.chat import ChatOptions, ChatRenderer
from dist_vlm.engine.front import load_chat, load_front, load_tokenizer
from dist_vlm.workers.models import get_family

CONVERSATION = [{"role": "user", "content": "hi"}]


DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "checkpoint"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A checkpoint without weights."""
    return Path(shutil.copytree(DEMO, tmp_path / "whole", ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture
def bare(whole: Path, tmp_path: Path) -> Path:
    """The same without a chat template."""
    copy = Path(shutil.copytree(whole, tmp_path / "bare"))
    (copy / "chat_template.jinja").unlink()
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    return copy


def chat_of(folder: Path, *, chat_template: str | None = None, **fields: Any) -> ChatRenderer:
    config = resolve(EngineConfig.from_fields(model=str(folder), device="cpu", **fields))
    return load_chat(config, load_tokenizer(config.model.tokenizer or ""), chat_template=chat_template)


def said(chat: ChatRenderer) -> str:
    return chat.render(CONVERSATION).prompt


def test_the_operators_comes_first(whole: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("F{{ messages[0].content }}")
    assert said(chat_of(whole, chat_template=str(file))) == "Fhi"
    chat = chat_of(whole, chat_template="T{{ messages[0].content }}")
    assert said(chat) == "Thi"
    # but for one that a caller of the library gives with the conversation
    assert chat.render(CONVERSATION, ChatOptions("C{{ messages[0].content }}")).prompt == "Chi"


def test_then_the_tokenizers(whole: Path) -> None:
    (whole / "chat_template.json").write_text(json.dumps({"chat_template": "J{{ messages[0].content }}"}))
    assert said(chat_of(whole)) == "USER: hi ASSISTANT:"


def test_then_the_one_beside_it_or_in_the_checkpoint(bare: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(bare, tokenizer)
    (bare / "chat_template.json").write_text(json.dumps({"chat_template": "J{{ messages[0].content }}"}))
    assert said(chat_of(bare)) == "Jhi"
    assert said(chat_of(bare, tokenizer=str(tokenizer))) == "Jhi"
    (tokenizer / "chat_template.json").write_text(json.dumps({"chat_template": "B{{ messages[0].content }}"}))
    assert said(chat_of(bare, tokenizer=str(tokenizer))) == "Bhi"


def test_then_the_familys_and_the_log_says_so(bare: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dist_vlm"):
        chat = chat_of(bare)
    assert "the one built in for the family" in caplog.text
    assert chat.has_template
    assert said(chat) == "USER: hi ASSISTANT:"


def test_without_any_a_warning_says_what_is_refused(
    bare: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bare(type(get_family("llava"))):  # type: ignore[misc]
        chat_template = None

    monkeypatch.setattr(front, "get_family", lambda name: Bare())
    chat = chat_of(bare)
    assert not chat.has_template
    assert "are refused unless one is given" in caplog.text
    with pytest.raises(ValueError, match="no chat template: pass one"):
        chat.render(CONVERSATION)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("absent.jinja", "chat_template = 'absent.jinja': no such file"),
        ("{% for %}", "chat_template is not Jinja: line 1"),
    ],
)
def test_a_wrong_template_is_found_at_the_start(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat_of(DEMO, chat_template=given)


def test_the_front_renders_with_what_it_was_given() -> None:
    config = resolve(EngineConfig.from_fields(model=str(DEMO), device="cpu"))
    loaded = load_front(config, chat_template="T{{ messages[0].content }}")
    assert said(loaded.chat) == "Thi"
    assert loaded.chat.placeholder == "<image>"
