from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from dist_vlm.config import ConfigError
from dist_vlm.engine.template_source import built_in_template, given_template, stored_template


def test_a_file_that_is_there_is_read(tmp_path: Path) -> None:
    file = tmp_path / "{{ odd }}.jinja"
    file.write_text("é {{ messages }}\n", encoding="utf-8")
    assert given_template(str(file)) == "é {{ messages }}\n"


@pytest.mark.parametrize("text", ["{{ messages }}", "{% for m in messages %}\n{% endfor %}", "{" * 100_000])
def test_anything_else_with_a_brace_is_the_template_itself(text: str) -> None:
    assert given_template(text) == text


def test_anything_else_is_refused(tmp_path: Path) -> None:
    def fails(given: str, message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            given_template(given, field="server.chat_template")
        assert str(caught.value) == f"server.chat_template = {given!r}: {message}"

    fails("absent.jinja", "no such file (and no template: it has no {)")
    fails("/", "no such file (and no template: it has no {)")
    latin, empty = tmp_path / "l", tmp_path / "e"
    latin.write_bytes(b"\xe9{{ messages }}")
    empty.write_text(" \n")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        given_template(str(latin))
    with pytest.raises(ConfigError, match="^chat_template = .*: is an empty file"):
        given_template(str(empty))


def test_a_stored_one_is_that_of_the_first_folder_with_one(tmp_path: Path) -> None:
    first, second = tmp_path / "tokenizer", tmp_path / "model"
    first.mkdir()
    second.mkdir()
    folders = [str(first), str(second)]
    assert stored_template(folders) is None
    (second / "chat_template.json").write_text(json.dumps({"chat_template": "B {{ 1 }}"}))
    assert stored_template(folders) == "B {{ 1 }}"
    (second / "chat_template.jinja").write_text("C")
    assert stored_template(folders) == "C"
    (first / "chat_template.json").write_text(json.dumps({"chat_template": "A"}))
    assert stored_template(folders) == "A"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "chat_template must be a string"),
        ("{}", "chat_template must be a string"),
        ('{"chat_template": {"default": "x"}}', "chat_template must be a string"),
    ],
)
def test_a_file_that_holds_none_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(text)
    with pytest.raises(ValueError, match=f"chat_template.json:? {message}"):
        stored_template([str(tmp_path)])


def test_the_log_tells_of_the_familys_own(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert built_in_template("some", "{{ 1 }}") == "{{ 1 }}"
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "the one built in for the family some is used" in caplog.text
    caplog.clear()
    assert built_in_template("some", None) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "/v1/chat/completions) are refused unless one is given (--chat-template)" in caplog.text
