"""Prompts stay out of the log unless asked for, and then take one line each."""

from __future__ import annotations

import logging

import pytest

from dist_vlm.config_server import ServerConfig
from dist_vlm.server.prompt_log import log_prompt


def logged(caplog: pytest.LogCaptureFixture, prompt: str | None, **config: object) -> list[str]:
    with caplog.at_level(logging.DEBUG):
        log_prompt(ServerConfig(**config), "id-1", prompt)  # type: ignore[arg-type]
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("config", [{}, {"log_prompts": False, "max_log_len": 100}])
def test_prompts_are_not_logged_by_themselves(caplog: pytest.LogCaptureFixture, config: dict[str, object]) -> None:
    assert logged(caplog, "secret", **config) == []


@pytest.mark.parametrize(
    ("limit", "shown"), [(None, "'what is this?'"), (100, "'what is this?'"), (4, "'what'"), (0, "''")]
)
def test_a_prompt_is_cut_to_its_limit(caplog: pytest.LogCaptureFixture, limit: int | None, shown: str) -> None:
    assert logged(caplog, "what is this?", log_prompts=True, max_log_len=limit) == [f"prompt id=id-1 {shown}"]


def test_no_prompt_writes_a_line_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = logged(caplog, "a\nINFO forged\r\x1b[2J\u2028\x85\ud800 %s %d", log_prompts=True)
    assert line == r"prompt id=id-1 'a\nINFO forged\r\x1b[2J\u2028\x85\ud800 %s %d'"
    assert len(line.splitlines()) == 1
    line.encode()


def test_a_prompt_of_tokens_has_no_text(caplog: pytest.LogCaptureFixture) -> None:
    assert logged(caplog, None, log_prompts=True) == []
