"""What a launched step computes, from the device's tensors to its result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_vlm.workers.pack import PromptRows
from dist_vlm.workers.plan import (
    ImageFailure,
    PromptLogprobs,
    SampledTokens,
    Slice,
    SlotFailure,
    StepResult,
    TokenLogprobs,
)
from dist_vlm.workers.sampler import PendingLogprobs

# Why a slot may fail, by the columns of a step's status.
SLOT_FAILURES = (
    "the request could not be made part of a batch",
    "its next token could not be sampled",
    "the model's logits are not finite numbers",
)
UNPACKABLE, UNSAMPLED, NOT_FINITE = range(len(SLOT_FAILURES))


@dataclass(frozen=True, slots=True)
class Computed:
    """The tensors of a step, enqueued.

    tokens: int64 [R], one for each slice that samples.
    status: float32 [slices, failures], above zero where a slice failed for that reason on any rank.
    rows: where not every one of `tokens` is meant, those that are.
    logprobs: slots and the log probabilities of the tokens they sampled. prompt_logprobs: of prompt tokens, in parts.
    """

    tokens: Tensor
    status: Tensor
    logprobs: tuple[tuple[int, ...], PendingLogprobs] | None
    prompt_logprobs: Sequence[tuple[PromptRows, Sequence[PendingLogprobs]]]
    rows: Sequence[int] | None = None

    def to_host(self) -> Computed:
        """Enqueues the copy of everything to the host."""
        return Computed(
            self.tokens.to("cpu", non_blocking=True),
            self.status.to("cpu", non_blocking=True),
            None if self.logprobs is None else (self.logprobs[0], self.logprobs[1].to_host()),
            [(rows, [part.to_host() for part in parts]) for rows, parts in self.prompt_logprobs],
        )


class LaunchedStep:
    """A step whose tensors are on their way to the host. See `PendingStep`.

    result: the step's result as far as it was known at the launch. device: where the step runs.
    find_image_failures: tells, once the step has ended, which of the images that it encoded failed after all.
    """

    def __init__(
        self,
        result: StepResult,
        computed: Computed | None,
        slices: Sequence[Slice],
        *,
        device: torch.device,
        find_image_failures: Callable[[], tuple[ImageFailure, ...]] | None = None,
    ) -> None:
        self._result = result
        self._computed = computed
        self._slices = slices
        self._find_image_failures = find_image_failures
        self._arrived: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def ready(self) -> bool:
        return self._arrived is None or self._arrived.query()

    def result(self) -> StepResult:
        if self._arrived is not None:
            self._arrived.synchronize()
        result = self._result
        if self._find_image_failures is not None:
            result = dataclasses.replace(result, image_failures=result.image_failures + self._find_image_failures())
        return result if self._computed is None else self._completed(result, self._computed)

    def _completed(self, result: StepResult, computed: Computed) -> StepResult:
        failures = self._failures(computed.status)
        prompt_logprobs = self._prompt_logprobs(computed, failures)
        return dataclasses.replace(
            result,
            sampled=self._sampled(computed, failures),
            prompt_logprobs=prompt_logprobs,
            slot_failures=tuple(SlotFailure(slot, reason) for slot, reason in failures.items()),
        )

    def _failures(self, status: Tensor) -> dict[int, str]:
        failures: dict[int, str] = {}
        for piece, votes in zip(self._slices, status.tolist(), strict=True):
            if any(votes):
                failures[piece.slot] = next(reason for reason, vote in zip(SLOT_FAILURES, votes, strict=True) if vote)
        return failures

    def _sampled(self, computed: Computed, failures: Mapping[int, str]) -> tuple[SampledTokens, ...]:
        slots = [piece.slot for piece in self._slices if piece.sample]
        logprobs: dict[int, TokenLogprobs] = {}
        if computed.logprobs is not None:
            asked, pending = computed.logprobs
            logprobs = dict(zip(asked, pending.read(), strict=True))
        tokens = computed.tokens.tolist()
        if computed.rows is not None:
            tokens = [tokens[row] for row in computed.rows]
        if not failures and not logprobs:
            return tuple([SampledTokens(slot, (token,)) for slot, token in zip(slots, tokens, strict=True)])
        return tuple(
            SampledTokens(slot, (token,), (logprobs[slot],) if slot in logprobs else ())
            for slot, token in zip(slots, tokens, strict=True)
            if slot not in failures
        )

    def _prompt_logprobs(self, computed: Computed, failures: dict[int, str]) -> tuple[PromptLogprobs, ...]:
        """Adds to `failures` the slots whose log probabilities are no numbers: a slice that samples nothing has no
        status of its logits."""
        told = []
        for rows, parts in computed.prompt_logprobs:
            if rows.slot in failures:
                continue
            entries: list[TokenLogprobs] = [entry for part in parts for entry in part.read()]
            if any(math.isnan(entry.logprob) for entry in entries):
                failures[rows.slot] = SLOT_FAILURES[NOT_FINITE]
            else:
                told.append(PromptLogprobs(rows.slot, rows.start, tuple(entries)))
        return tuple(told)
