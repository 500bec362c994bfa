"""An answer as it grows, in the parts that are new, and its log probabilities in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dist_vlm.outputs import CompletionOutput, Logprob, RequestOutput

# OpenAI's word for a log probability too small to write: JSON has no infinity.
_SMALLEST = -9999.0
_PARTIAL = "\ufffd"

TokenLogprobs = dict[int, Logprob]


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of one answer.

    token_ids: its new tokens. logprobs: theirs, where asked for.
    finish_reason: set in the answer's last delta.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] | None
    finish_reason: str | None
    stop_reason: int | str | None


class Deltas:
    """Turns a request's growing output into what is new of each answer since the last time."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, int]] = {}
        self._finished: set[int] = set()

    def of(self, output: RequestOutput) -> Iterator[Delta]:
        for answer in output.outputs:
            if answer.index in self._finished:
                continue
            num_characters, num_tokens = self._seen.get(answer.index, (0, 0))
            if answer.finished():
                self._finished.add(answer.index)
            elif len(answer.text) == num_characters and len(answer.token_ids) == num_tokens:
                continue
            self._seen[answer.index] = len(answer.text), len(answer.token_ids)
            yield Delta(
                index=answer.index,
                text=answer.text[num_characters:],
                token_ids=answer.token_ids[num_tokens:],
                logprobs=None if answer.logprobs is None else answer.logprobs[num_tokens:],
                finish_reason=answer.finish_reason,
                stop_reason=answer.stop_reason,
            )


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Tokens of all prompts, their pictures' placeholders included, and of all answers."""
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_answer = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }


def as_delta(answer: CompletionOutput) -> Delta:
    """A finished answer as one delta."""
    return Delta(answer.index, answer.text, answer.token_ids, answer.logprobs, answer.finish_reason, answer.stop_reason)


def chat_logprobs(delta: Delta, num_alternatives: int) -> dict[str, Any] | None:
    """The form of /v1/chat/completions."""
    if delta.logprobs is None:
        return None
    content = []
    for token, entries in zip(delta.token_ids, delta.logprobs, strict=True):
        top = [_chat_entry(entry) for _, entry in _likeliest(entries, num_alternatives)]
        content.append({**_chat_entry(entries[token]), "top_logprobs": top})
    return {"content": content}


def completion_logprobs(
    tokens: Sequence[tuple[int, str]],
    logprobs: Sequence[TokenLogprobs | None],
    *,
    num_alternatives: int,
    offset: int,
) -> dict[str, Any]:
    """The form of /v1/completions.

    tokens: each with its text. logprobs: theirs; None for a prompt's first token, which nothing comes before.
    offset: characters of text before the first of them.
    """
    values, tops, offsets = [], [], []
    for (token, text), entries in zip(tokens, logprobs, strict=True):
        values.append(None if entries is None else _finite(entries[token].logprob))
        tops.append(None if entries is None else _alternatives(token, entries, num_alternatives))
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": [text for _, text in tokens],
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _alternatives(token: int, entries: TokenLogprobs, count: int) -> dict[str, float]:
    """Texts with their log probabilities, the likeliest first, and the token's own in any case. Two tokens of one text
    count as the likelier."""
    texts: dict[str, float] = {}
    for _, entry in [*_likeliest(entries, count), (token, entries[token])]:
        texts.setdefault(entry.decoded_token or "", _finite(entry.logprob))
    return texts


def _likeliest(entries: TokenLogprobs, count: int) -> list[tuple[int, Logprob]]:
    ranked = sorted(entries.items(), key=lambda item: (-item[1].logprob, item[0]))
    return ranked[:count]


def _chat_entry(entry: Logprob) -> dict[str, Any]:
    text = entry.decoded_token or ""
    # A token that is a part of a character has bytes that its text does not tell.
    codes = None if _PARTIAL in text else list(text.encode("utf-8"))
    return {"token": text, "logprob": _finite(entry.logprob), "bytes": codes}


def _finite(value: float) -> float:
    return value if value > _SMALLEST else _SMALLEST  # NaN is above nothing
