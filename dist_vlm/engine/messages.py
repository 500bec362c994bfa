"""What the front (API, command line) and the engine core say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dist_vlm.executor.base import StageKind
from dist_vlm.sched.request import FinishReason
from dist_vlm.workers.plan import ImageSpan, SamplingRow, TokenLogprobs


@dataclass(frozen=True, slots=True)
class EngineImage:
    """An image of a request: where it lies, and what is to be encoded.

    array: coded pixels, or float32 pixel values [1, channels, height, width] or vision-tower output [1, rows, width].
    """

    span: ImageSpan
    kind: StageKind
    array: np.ndarray


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request in the engine's terms, fully checked: one answer to one prompt.

    max_tokens: bounded by the longest sequence. stop_token_ids: the end-of-sequence tokens included, unless
        they are to be ignored.
    priority: lower runs first; equal ones in the order of their arrival.
    cache_salt: requests share cached KV blocks only with requests of the same salt.
    output_token_ids: of a request that another engine began, the tokens it has answered. They count for max_tokens, are
        not told again, and what follows them is what would have followed there.
    num_prompt_logprobs: of such a request, how many tokens of the prompt have been told with theirs.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    images: tuple[EngineImage, ...]
    sampling: SamplingRow
    max_tokens: int
    stop_token_ids: frozenset[int]
    priority: int = 0
    cache_salt: str = ""
    output_token_ids: tuple[int, ...] = ()
    num_prompt_logprobs: int = 0


class EngineOutput(NamedTuple):
    """News of one request: new tokens, its end, or both.

    logprobs: one for each new token where the request asked for them, else empty.
    prompt_logprobs: news of the prompt's log probabilities, for the tokens after those told before; the first told
        is the prompt's second token's.
    stop_reason: the token that stopped it, or the cause of an error.
    first_scheduled_time: `time.time()` of the first plan that named it.
    num_cached_tokens: prompt tokens whose keys and values an earlier request had left.
    """

    request_id: str
    new_token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    first_scheduled_time: float | None = None
    num_preemptions: int = 0
    num_cached_tokens: int = 0
