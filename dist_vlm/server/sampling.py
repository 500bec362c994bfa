"""From a request's fields to `SamplingParams`, which checks their ranges."""

from __future__ import annotations

import re
from typing import Any

from dist_vlm.sampling import SamplingParams
from dist_vlm.server.errors import ApiError
from dist_vlm.server.fields import (
    CHAT_TEMPERATURE,
    COMPLETION_MAX_TOKENS,
    ChatFields,
    CompletionFields,
    SamplingFields,
)

# In one spelling, so that no two keys are the same token.
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")

# Fields that go under their own names; one that is absent takes the default of `SamplingParams`.
_SAME = (
    "frequency_penalty", "presence_penalty", "repetition_penalty", "min_tokens", "n", "best_of", "seed", "stop",
    "stop_token_ids", "temperature", "top_p", "top_k", "min_p", "ignore_eos", "bad_words", "skip_special_tokens",
    "spaces_between_special_tokens", "include_stop_str_in_output",
)  # fmt: skip


def chat_sampling(fields: ChatFields) -> SamplingParams:
    """Raises `ValueError` naming the field, its value and what is allowed."""
    values = {"temperature": CHAT_TEMPERATURE, **_common(fields)}
    values["max_tokens"] = _max_tokens(fields)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise ValueError(f"top_logprobs = {fields.top_logprobs!r}: needs logprobs = true")
    if fields.logprobs:
        values["logprobs"] = _named("top_logprobs", fields.top_logprobs or 0)
    return SamplingParams(**values)


def completion_sampling(fields: CompletionFields) -> SamplingParams:
    """Raises `ValueError` naming the field, its value and what is allowed."""
    values = _common(fields)
    values["max_tokens"] = COMPLETION_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
    values["logprobs"] = _named("logprobs", fields.logprobs)
    values["truncate_prompt_tokens"] = fields.truncate_prompt_tokens
    if fields.echo and fields.logprobs is not None:
        values["prompt_logprobs"] = fields.logprobs
    return SamplingParams(**values)


def check_streaming(fields: SamplingFields) -> None:
    """Raises a 400 for stream options without a stream, and for answers that are known only at their end."""
    if fields.stream_options is not None and not fields.stream:
        raise ApiError(400, "stream_options: needs stream = true", param="stream_options")
    if fields.stream and fields.best_of is not None and fields.best_of != (fields.n or 1):
        text = f"best_of = {fields.best_of}: must be n where stream is true, for the best is known only at the end"
        raise ApiError(400, text, param="best_of")


def _common(fields: SamplingFields) -> dict[str, Any]:
    values = {name: getattr(fields, name) for name in _SAME if getattr(fields, name) is not None}
    if fields.logit_bias is not None:
        values["logit_bias"] = {_token_id(key): bias for key, bias in fields.logit_bias.items()}
    return values


def _max_tokens(fields: ChatFields) -> int | None:
    """None: as many as there is room for."""
    if fields.max_completion_tokens is None:
        return fields.max_tokens
    if fields.max_tokens not in (None, fields.max_completion_tokens):
        raise ValueError(
            f"max_completion_tokens = {fields.max_completion_tokens}: contradicts max_tokens = {fields.max_tokens}; "
            "give one of them"
        )
    if fields.max_completion_tokens < 1:
        raise ValueError(f"max_completion_tokens = {fields.max_completion_tokens}: must be an integer, at least 1")
    return fields.max_completion_tokens


def _named(name: str, value: int | None) -> int | None:
    if value is not None and value < 0:
        raise ValueError(f"{name} = {value}: must be an integer, at least 0")
    return value


def _token_id(key: str) -> int:
    if not _TOKEN_ID.fullmatch(key):
        raise ValueError(f"logit_bias has the key {key[:40]!r}: must be a token id")
    return int(key)
