"""Where a chat template comes from: the operator, the checkpoint's files, or its model family."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from dist_vlm.config import ConfigError

_log = logging.getLogger(__name__)


def given_template(given: str, *, field: str = "chat_template") -> str:
    """The text of a template that is given as the path of its file, or as the text itself.

    Raises `ConfigError` naming the field where it is neither, or the file cannot be read.
    """
    if not os.path.isfile(given):
        if "{" in given:
            return given
        raise ConfigError("no such file (and no template: it has no {)", field=field, value=given)
    try:
        text = Path(given).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror or error}", field=field, value=given) from None
    except UnicodeDecodeError:
        raise ConfigError("is not UTF-8 text", field=field, value=given) from None
    if not text.strip():
        raise ConfigError("is an empty file", field=field, value=given)
    return text


def stored_template(folders: Sequence[str]) -> str | None:
    """The template in the first of the folders that has one, beside what a tokenizer reads by itself: published
    processors keep theirs in chat_template.json. Raises `ValueError` naming a file that holds none."""
    for folder in dict.fromkeys(folders):
        plain, wrapped = Path(folder) / "chat_template.jinja", Path(folder) / "chat_template.json"
        if plain.is_file():
            return plain.read_text(encoding="utf-8")
        if wrapped.is_file():
            return _unwrapped(wrapped)
    return None


def _unwrapped(file: Path) -> str:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{file} is not JSON") from None
    template = content.get("chat_template") if isinstance(content, dict) else None
    if not isinstance(template, str):
        raise ValueError(f"{file}: chat_template must be a string")
    return template


def built_in_template(family: str, template: str | None) -> str | None:
    """The family's own template, the last resort; the log says that it is used, or that there is none."""
    if template is None:
        _log.warning(
            "no chat template: neither the checkpoint nor the family %s has one; conversations (LLM.chat, "
            "/v1/chat/completions) are refused unless one is given (--chat-template)",
            family,
        )
    else:
        _log.info("the checkpoint has no chat template: the one built in for the family %s is used", family)
    return template
