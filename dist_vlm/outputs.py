"""What comes back for a request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely the model found one token at one position, before penalties, bias, temperature and cuts.

    logprob: natural logarithm. rank: 1 + how many tokens of the vocabulary are likelier.
    decoded_token: the token's text by itself, U+FFFD for bytes that make no character; None without detokenizing.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times of a request in seconds: `time.time()` for the moments, a difference for `time_in_queue`."""

    arrival_time: float
    last_token_time: float | None = None
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    time_in_queue: float | None = None
    finished_time: float | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One answer, whole or as far as it has come.

    text: the answer's text so far; what has been shown stays. Half a character, and what may be the beginning of a
        stop string, is shown once it is decided.
    token_ids: its tokens, the one that ended it included.
    cumulative_logprob: sum over its tokens, where log probabilities were computed.
    logprobs: one entry a token where asked for: the token itself and its likeliest alternatives, by token id.
    finish_reason: None while it grows; "stop" (end of sequence, a stop token or a stop string), "length" (max_tokens
        or the longest sequence), "abort", or "error".
    stop_reason: the stop string that ended it, or the stop token if that is not the end-of-sequence token; after an
        error its cause.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The answers to one request.

    prompt_token_ids: the prompt as the model saw it, each image expanded to its placeholder tokens.
    outputs: n answers, by their index. Where they are the best n of more, they are empty until all have ended, and
        then in the order of their cumulative log probabilities, the highest first.
    prompt_logprobs: one entry a prompt token as far as they have come, where asked for; None for the first token,
        which nothing comes before.
    error: why the request failed, alone, while others went on; None for any other end.
    num_preemptions: of all its answers together.
    num_cached_tokens: prompt tokens that were not computed, because an earlier request had left their keys and values.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics | None = None
    lora_request: None = None
    error: str | None = None
    num_preemptions: int = 0
    num_cached_tokens: int = 0
