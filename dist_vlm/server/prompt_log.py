"""The text of prompts in the log, where the operator asked for it."""

from __future__ import annotations

import logging

from dist_vlm.config_server import ServerConfig

_log = logging.getLogger("dist_vlm.prompts")


def log_prompt(config: ServerConfig, request_id: str, prompt: str | None) -> None:
    """Writes a prompt in one line, cut to `max_log_len` characters; nothing unless `log_prompts` is set."""
    if config.log_prompts and prompt is not None:
        _log.info("prompt id=%s %r", request_id, prompt[: config.max_log_len])
