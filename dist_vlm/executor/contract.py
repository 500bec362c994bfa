"""What the contract asks of a driver, checked plan by plan, with the bookkeeping of a rank and nothing computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dist_vlm.executor import made_up_logprobs
from dist_vlm.workers.plan import (
    ImageFailure,
    ImageSpan,
    NewSequence,
    PromptLogprobs,
    SampledTokens,
    SamplingRow,
    Slice,
    SlotFailure,
    StepCounters,
    StepPlan,
    StepResult,
)


class ContractError(AssertionError):
    """A plan or a call that no rank could carry out: a mistake of the driver's own code."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes a rank is started with; None means unlimited."""

    num_blocks: int
    block_size: int = 16
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None


@dataclass(frozen=True, slots=True)
class Script:
    """What the ranks answer.

    next_token: (tokens at positions 0..position-1, position) -> the token sampled for `position`.
    image_failure: content key -> why its encoding fails, or None.
    slot_failure: (step id, slot) -> why that slice fails, or None.
    """

    next_token: Callable[[Sequence[int], int], int]
    image_failure: Callable[[str], str | None]
    slot_failure: Callable[[int, int], str | None]


@dataclass(slots=True)
class _Slot:
    """prints: what stands at each position and before it, as far as anybody asked."""

    images: tuple[ImageSpan, ...]
    tokens: list[int]
    num_prompt: int
    sampling: SamplingRow
    prints: list[int] = field(default_factory=list)
    computed: int = 0
    table: list[int] = field(default_factory=list)
    last_step: int = -1
    failed_step: int | None = None

    def prompt_logprobs(self, piece: Slice, num_alternatives: int) -> PromptLogprobs:
        return made_up_logprobs.of_prompt(
            piece, self.tokens, num_prompt=self.num_prompt, num_alternatives=num_alternatives
        )


class Ledger:
    """Applies plans in order. A violation raises `ContractError` naming the step and what is wrong.

    staged: content key -> feature rows (None where unknown) of the images every rank has acknowledged. The
        executor keeps it up to date.
    """

    def __init__(self, limits: Limits, script: Script) -> None:
        self.limits = limits
        self.script = script
        self.staged: dict[str, int | None] = {}
        self.slots: dict[int, _Slot] = {}
        self.features: dict[str, int | None] = {}
        self.collected = -1
        self._step = -1
        self._holders: dict[int, set[int]] = {}
        self._content: dict[tuple[int, int], int] = {}
        self._last_use: dict[int, int] = {}
        self._failed_images: dict[str, int] = {}

    def apply(self, plan: StepPlan) -> StepResult:
        """Checks a plan against everything told before, and answers it as rank 0 would."""
        self._require(plan.step_id == self._step + 1, f"step id {plan.step_id} after {self._step}")
        self._step = plan.step_id
        for slot in plan.release:
            self._release(slot)
        self._drop(plan.drop_features)
        for source, destination in plan.copy_blocks:
            self._check_block(source)
            self._check_block(destination)
            self._require(source != destination, f"block {source} is copied onto itself")
        for sequence in plan.new:
            self._take(sequence)
        image_failures = self._encode(plan)
        sampled, prompt_logprobs, slot_failures = self._run(plan)
        return StepResult(
            step_id=plan.step_id,
            rank=0,
            sampled=tuple(sampled),
            prompt_logprobs=tuple(prompt_logprobs),
            image_failures=tuple(image_failures),
            slot_failures=tuple(slot_failures),
            counters=StepCounters(num_encoded_images=len(plan.encode) - len(image_failures)),
        )

    def _require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise ContractError(f"step {self._step}: {problem}")

    def _check_block(self, block: int) -> None:
        top = self.limits.num_blocks
        self._require(0 <= block < top, f"block {block} is outside [0, {top})")

    def _release(self, slot: int) -> None:
        self._require(slot in self.slots, f"slot {slot} is released and holds no sequence")
        state = self.slots.pop(slot)
        for block in state.table:
            self._holders[block].discard(slot)
            self._last_use[block] = max(state.last_step, self._last_use.get(block, -1))

    def _drop(self, keys: tuple[str, ...]) -> None:
        for key in keys:
            if key not in self.features and key in self._failed_images:
                continue  # a rank may hold something in place of its features
            self._require(key in self.features, f"features of image {key!r} are dropped and not held")
            del self.features[key]

    def _failure_unseen(self, key: str) -> bool:
        """Whether the image failed in a step whose result the driver has not read yet."""
        return self._failed_images.get(key, -1) > self.collected

    def _take(self, sequence: NewSequence) -> None:
        slot, length = sequence.slot, len(sequence.token_ids)
        where = f"new sequence in slot {slot}"
        self._require(slot >= 0, f"{where}: negative")
        for limit, name, value in (
            (self.limits.max_num_seqs, "max_num_seqs", slot + 1),
            (self.limits.max_model_len, "max_model_len", length),
        ):
            self._require(limit is None or value <= limit, f"{where}: {value} is above {name} = {limit}")
        self._require(slot not in self.slots, f"{where}: the slot is taken")
        self._require(length > 0, f"{where}: no tokens")
        prompt = sequence.num_prompt_tokens
        self._require(1 <= prompt <= length, f"{where}: num_prompt_tokens {prompt} is outside [1, {length}]")
        end = 0
        for span in sequence.images:
            inside = end <= span.start and span.count > 0 and span.end <= length
            self._require(inside, f"{where}: {span} overlaps the one before or leaves [0, {length})")
            end = span.end
        self.slots[slot] = _Slot(sequence.images, list(sequence.token_ids), prompt, sequence.sampling)

    def _encode(self, plan: StepPlan) -> list[ImageFailure]:
        self._require(len(set(plan.encode)) == len(plan.encode), "an image is encoded twice")
        needed = {
            span.image
            for piece in plan.slices
            if piece.slot in self.slots
            for span in self.slots[piece.slot].images
            if span.start < piece.start + piece.count and span.end > piece.start
        }
        failures = []
        for key in plan.encode:
            self._require(key in self.staged, f"image {key!r} is encoded and not staged on every rank")
            self._require(key not in self.features, f"image {key!r} is encoded and its features are held already")
            self._require(key in needed, f"image {key!r} is encoded and lies under no slice")
            reason = self.script.image_failure(key)
            if reason is None:
                self._failed_images.pop(key, None)
                self.features[key] = self.staged[key]
            else:
                self._failed_images[key] = self._step
                failures.append(ImageFailure(image=key, reason=reason))
        return failures

    def _run(self, plan: StepPlan) -> tuple[list[SampledTokens], list[PromptLogprobs], list[SlotFailure]]:
        limit = self.limits.max_num_batched_tokens
        in_budget = limit is None or plan.num_tokens <= limit
        self._require(in_budget, f"{plan.num_tokens} tokens are above max_num_batched_tokens = {limit}")
        sampled: list[SampledTokens] = []
        prompts: list[PromptLogprobs] = []
        failures: list[SlotFailure] = []
        seen: set[int] = set()
        for piece in plan.slices:
            self._require(piece.slot not in seen, f"slot {piece.slot} has two slices")
            seen.add(piece.slot)
            state = self._extend(piece)
            if state.failed_step is not None or not self._has_features(piece, state):
                continue
            reason = self.script.slot_failure(plan.step_id, piece.slot)
            if reason is not None:
                state.failed_step = plan.step_id
                failures.append(SlotFailure(slot=piece.slot, reason=reason))
                continue
            if state.sampling.prompt_logprobs is not None:
                prompts.append(state.prompt_logprobs(piece, state.sampling.prompt_logprobs))
            if piece.sample:
                sampled.append(self._sample(piece.slot, state))
        return sampled, prompts, failures

    def _sample(self, slot: int, state: _Slot) -> SampledTokens:
        token = self.script.next_token(tuple(state.tokens), len(state.tokens))
        state.tokens.append(token)
        asked = state.sampling.logprobs
        return SampledTokens(slot, (token,), () if asked is None else (made_up_logprobs.of_token(token, asked),))

    def _extend(self, piece: Slice) -> _Slot:
        """Checks a slice against its slot and appends its blocks."""
        where = f"slice of slot {piece.slot}"
        self._require(piece.slot in self.slots, f"{where}: the slot holds no sequence")
        state = self.slots[piece.slot]
        failed = state.failed_step
        if failed is not None:
            # A slice sent before the failure was read is skipped; one sent after it is a mistake.
            self._require(failed > self.collected, f"{where}: it failed in step {failed} and was not released")
        if not state.table:
            self._take_cached(piece, state, where)
        self._append_blocks(piece, state, where)
        self._require(piece.count > 0, f"{where}: {piece.count} positions")
        self._require(piece.start == state.computed, f"{where}: starts at {piece.start}, not at {state.computed}")
        end = piece.start + piece.count
        room = len(state.table) * self.limits.block_size
        self._require(end <= room, f"{where}: ends at {end}, its blocks cover {room} positions")
        if failed is None:
            known = len(state.tokens)
            self._require(end <= known, f"{where}: ends at {end}, only {known} tokens are known")
            wrong = piece.sample and end != known
            self._require(not wrong, f"{where}: samples position {end}, whose token is known")
        self._write(piece, state, where)
        state.computed = end
        state.last_step = self._step
        return state

    def _take_cached(self, piece: Slice, state: _Slot, where: str) -> None:
        """A new sequence's blocks before its first slice: others computed them, and they must hold its beginning."""
        size = self.limits.block_size
        self._require(piece.start % size == 0, f"{where}: begins at {piece.start}, inside a block")
        self._require(piece.start < len(state.tokens), f"{where}: nothing is left to compute from {piece.start} on")
        prints = _prints(state, piece.start)
        for position, expected in enumerate(prints):
            block = piece.block_ids[position // size]
            found = self._content.get((block, position % size))
            self._require(found == expected, f"{where}: block {block} does not hold its position {position}")
        for block in piece.block_ids[: piece.start // size]:
            self._holders.setdefault(block, set()).add(piece.slot)
            state.table.append(block)
        state.computed = piece.start

    def _append_blocks(self, piece: Slice, state: _Slot, where: str) -> None:
        cached = len(state.table) if state.last_step < 0 else 0
        for block in piece.block_ids[cached:]:
            self._check_block(block)
            holders = sorted(self._holders.get(block, ()))
            self._require(not holders, f"{where}: block {block} belongs to slot {holders and holders[0]}")
            last = self._last_use.get(block, -1)
            self._require(last <= self.collected, f"{where}: block {block} is named by step {last}, not yet collected")
            self._holders[block] = {piece.slot}
            state.table.append(block)

    def _write(self, piece: Slice, state: _Slot, where: str) -> None:
        """The slice's keys and values: into blocks that no other sequence holds."""
        size, end = self.limits.block_size, piece.start + piece.count
        usable = state.failed_step is None and not self._lacks_features(piece, state)
        prints = _prints(state, end) if usable else []
        for position in range(piece.start, end):
            block = state.table[position // size]
            self._require(len(self._holders[block]) == 1, f"{where}: writes to block {block}, which others hold too")
            if usable:
                self._content[block, position % size] = prints[position]
            else:
                self._content.pop((block, position % size), None)

    def _lacks_features(self, piece: Slice, state: _Slot) -> bool:
        return any(
            span.image not in self.features and span.start < piece.start + piece.count and span.end > piece.start
            for span in state.images
        )

    def _has_features(self, piece: Slice, state: _Slot) -> bool:
        for span in state.images:
            if span.start >= piece.start + piece.count or span.end <= piece.start:
                continue
            if span.image not in self.features and self._failure_unseen(span.image):
                state.failed_step = self._failed_images[span.image]
                return False
            where = f"slice of slot {piece.slot} over image {span.image!r}"
            self._require(span.image in self.features, f"{where}: its features are not encoded, or dropped")
            rows = self.features[span.image]
            self._require(rows in (None, span.count), f"{where}: {span.count} positions for {rows} feature rows")
        return True


def _prints(state: _Slot, count: int) -> list[int]:
    """Of the first `count` positions, one number each that covers everything up to it: tokens, or an image's rows."""
    for position in range(len(state.prints), count):
        content: object = state.tokens[position]
        for span in state.images:
            if span.start <= position < span.end:
                content = (span.image, position - span.start)
        state.prints.append(hash((state.prints[-1] if state.prints else 0, content)))
    return state.prints[:count]
