"""The contract between the driver and a rank: what one step does, and what came of it.

A plan is host-only, free of model names, and a delta: a rank keeps what earlier plans told it. A rank
applies the fields of one plan in this order: `release`, `drop_features`, `copy_blocks`, `new`, `encode`,
`slices`.

What a step has one of for every sequence is a named tuple: it is made, written and read several times as fast as a
dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """The positions of a sequence that one image fills.

    image: content key under which the image was staged (see `Executor.stage`).
    start: first position of the span in the sequence.
    count: number of positions, equal to the number of feature rows of the image.
    """

    image: str
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What a rank needs to choose a sequence's next token. The order in which it is applied: see `kernels/sample.py`.

    temperature: 0.0 means greedy: the highest logit, the lowest token id among equals.
    top_k: candidates kept; 0 keeps all.
    top_p: probability mass kept, in (0, 1].
    min_p: least probability kept, relative to the likeliest, in [0, 1].
    seed, sample_index: with the position of the new token, the key of the counter-based noise.
    presence_penalty, frequency_penalty: taken off the logits of tokens generated so far.
    repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or generated.
    logit_bias: (token id, bias) pairs, each added to its logit.
    bad_words: token sequences that are not to be generated: the last token of one is cut off while the tokens
        before it are the latest.
    min_tokens: generated tokens before which none of `stop_token_ids` may be sampled.
    stop_token_ids: read only where min_tokens > 0.
    logprobs: alternatives to report for each sampled token, 0 for the sampled token alone; None reports nothing.
    prompt_logprobs: the same for each token of the prompt but the first.
    processors: name under which functions (generated token ids, logits) -> logits were registered on the rank.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    sample_index: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    processors: str = ""


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that takes a slot, told whole and once.

    token_ids: all tokens known so far: the prompt, with one placeholder token for each row of an image,
        and after a preemption the tokens generated before it.
    num_prompt_tokens: how many of `token_ids` are the prompt.
    images: spans in ascending order of start, without overlap.
    """

    slot: int
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    images: tuple[ImageSpan, ...]
    sampling: SamplingRow


class Slice(NamedTuple):
    """The positions [start, start + count) of one sequence, computed in this step.

    A position beyond the tokens told in `NewSequence` holds the token that the slot sampled for it, which
    the rank wrote down itself.

    start: the first position computed. Of a new sequence it may be above 0: the blocks below it hold keys and
        values that an earlier sequence with the same beginning computed.
    block_ids: blocks appended to the slot's block table before this slice, so that it covers
        start + count positions.
    sample: whether the rank samples the token at position start + count.
    """

    slot: int
    start: int
    count: int  # type: ignore[assignment]  # in place of a tuple's method
    block_ids: tuple[int, ...]
    sample: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of all ranks.

    step_id: counts up by one from 0.
    new: sequences that take a slot.
    slices: at most one for each slot.
    release: slots to forget; a slot may be released and taken in one plan.
    encode: content keys of staged images to encode before the slices run, of which each lies under one.
    drop_features: content keys whose features are no longer needed, or that could not be encoded.
    copy_blocks: (source, destination) block ids, copied in order.
    """

    step_id: int
    new: tuple[NewSequence, ...] = ()
    slices: tuple[Slice, ...] = ()
    release: tuple[int, ...] = ()
    encode: tuple[str, ...] = ()
    drop_features: tuple[str, ...] = ()
    copy_blocks: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(piece.count for piece in self.slices)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position, of the model's own distribution: before penalties, bias, temperature and cuts.

    logprob: of the token at the position, natural logarithm.
    rank: 1 + how many tokens of the vocabulary are likelier.
    top_ids, top_logprobs: the likeliest tokens, in descending order, the lower id first among equals.
    """

    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class SampledTokens(NamedTuple):
    """The tokens one slot got in a step: one, or several where a step may confirm several.

    logprobs: one a token where the sequence asked for them, else empty.
    """

    slot: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log probabilities of a sequence's prompt tokens at the positions start, start + 1, ..."""

    slot: int
    start: int
    entries: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class ImageFailure:
    """An image that could not be encoded. Slices that needed it were left out of the step, or mean nothing."""

    image: str
    reason: str


@dataclass(frozen=True, slots=True)
class SlotFailure:
    """A slice that could not be computed; the other slices of the step were."""

    slot: int
    reason: str


@dataclass(frozen=True, slots=True)
class StepCounters:
    """What a rank did in one step: tests and statistics read it.

    num_collectives: collective calls of the language model, sampling and status exchange in this step.
    num_encoded_images: images that went through the encoder in this step on this rank.
    busy_us: microseconds from the receipt of the plan to its result.
    """

    num_collectives: int = 0
    num_encoded_images: int = 0
    busy_us: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """One rank's answer to one plan. All ranks return the same but for `rank` and `counters`.

    sampled: for each slice with `sample`, in the plan's order, unless it failed.
    prompt_logprobs: for each slice of a sequence that asked for them, the prompt tokens whose log probabilities its
        positions gave: those at [start + 1, start + count + 1) that lie in the prompt.
    """

    step_id: int
    rank: int
    sampled: tuple[SampledTokens, ...] = ()
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    image_failures: tuple[ImageFailure, ...] = ()
    slot_failures: tuple[SlotFailure, ...] = ()
    counters: StepCounters = StepCounters()
