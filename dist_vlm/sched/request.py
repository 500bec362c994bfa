"""The driver's record of one request. It never leaves the driver: ranks get the smaller `NewSequence`."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal

from dist_vlm.workers.plan import ImageSpan, SamplingRow

FinishReason = Literal["stop", "length", "abort", "error"]


class RequestState(enum.Enum):
    """NEW -> WAITING -> RUNNING -> FINISHED; preemption goes back to WAITING."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """What the scheduler knows of a request. The first block of fields is given, the rest is the scheduler's; output
    tokens and prompt log probabilities that an earlier engine told may be given too.

    max_tokens: most tokens to generate; prompt and these together fit the longest sequence allowed.
    stop_token_ids: a generated token of this set ends the request and is its last token.
    priority: lower runs first; equal ones in the order of their arrival.
    cache_salt: KV blocks are shared only with requests of the same salt.

    arrival: counts the requests of a scheduler.
    images_end: the first position behind all images.
    block_digests: of the blocks whose tokens are all known, as far as anybody asked for them.
    num_planned: positions computed by the plans made so far, sent or committed, or found cached.
    num_published: blocks offered to later requests, cached ones included.
    num_cached_tokens: positions that were found cached when the request first ran.
    num_prompt_logprobs: prompt tokens whose log probabilities have come.
    num_pending: tokens that plans in flight will sample.
    num_in_flight: plans in flight that name the request.
    first_scheduled_time: `time.time()` of the first plan that names the request.
    stop_reason: the stop token, or the cause of an error.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    images: tuple[ImageSpan, ...] = ()
    sampling: SamplingRow = SamplingRow()
    stop_token_ids: frozenset[int] = frozenset()
    priority: int = 0
    cache_salt: str = ""

    arrival: int = 0
    images_end: int = field(init=False)
    state: RequestState = RequestState.NEW
    output_token_ids: list[int] = field(default_factory=list)
    slot: int | None = None
    block_ids: list[int] = field(default_factory=list)
    block_digests: list[bytes] = field(default_factory=list)
    num_planned: int = 0
    num_published: int = 0
    num_cached_tokens: int = 0
    num_prompt_logprobs: int = 0
    num_pending: int = 0
    num_in_flight: int = 0
    num_preemptions: int = 0
    first_scheduled_time: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        self.images_end = max((span.end for span in self.images), default=0)

    @property
    def num_tokens(self) -> int:
        """Positions that hold a token or will once the plans in flight have run."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_pending

    @property
    def num_missing(self) -> int:
        """Positions still to be computed. A generation's last token is never computed: nothing follows it."""
        num_generated = len(self.output_token_ids) + self.num_pending
        if num_generated >= self.max_tokens:
            return 0
        return len(self.prompt_token_ids) + num_generated - self.num_planned

    @property
    def order(self) -> tuple[int, int]:
        """Ascending in the order in which requests are served."""
        return self.priority, self.arrival

    def known_tokens(self, num_tokens: int) -> tuple[int, ...]:
        """The first tokens of prompt and answer, at least `num_tokens` of them where so many are known."""
        if num_tokens <= len(self.prompt_token_ids):
            return self.prompt_token_ids
        return (*self.prompt_token_ids, *self.output_token_ids)

    @property
    def is_finished(self) -> bool:
        return self.state is RequestState.FINISHED

    def start_over(self) -> None:
        """Nothing of it is computed or planned any more, and it is nowhere queued; the tokens that it has stay. It may
        come to another cache, of which it knows no digests."""
        self.state = RequestState.NEW
        self.slot = None
        self.block_ids.clear()
        self.block_digests.clear()
        self.num_planned = self.num_published = self.num_pending = self.num_in_flight = 0

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        if self.is_finished:
            raise RuntimeError(f"request {self.request_id!r} ended twice: {self.finish_reason}, then {reason}")
        self.state = RequestState.FINISHED
        self.finish_reason, self.stop_reason = reason, stop_reason
