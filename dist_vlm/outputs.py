"""What comes back for a request."""

from __future__ import annotations

from dataclasses import dataclass


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

    text: the answer's text so far. token_ids: its tokens, the one that ended it included.
    finish_reason: None while it grows; "stop" (end of sequence or a stop token), "length" (max_tokens or the
        longest sequence), "abort", or "error".
    stop_reason: the stop token that ended it, if that is not the end-of-sequence token; after an error its cause.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, float]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The answers to one request.

    prompt_token_ids: the prompt as the model saw it, each image expanded to its placeholder tokens.
    error: why the request failed, alone, while others went on; None for any other end.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, float] | None] | None = None
    metrics: RequestMetrics | None = None
    lora_request: None = None
    error: str | None = None
    num_preemptions: int = 0
