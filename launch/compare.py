"""Compares a runtime with what transformers answered, token by token and in log probabilities.

A difference of log probabilities is the difference of the logits with that of their rows' normalisers taken out: what
adds the same to every logit of a row changes no distribution, and is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dist_vlm.launch.reference import ReferenceAnswer

if TYPE_CHECKING:
    from dist_vlm import LLM, RequestOutput


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first token of a free answer that is not transformers'.

    index: its place in the answer. expected, got: the two tokens.
    gap: how far transformers' logit of `got` is below its highest, in float32, after the same tokens.
    """

    index: int
    expected: int
    got: int
    gap: float


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What came of one probe.

    num_prompt_tokens, num_tokens: of transformers' prompt and answer.
    forced_difference: highest difference of log probabilities where prompt and answer are both given, over all
        positions and reported tokens.
    free_difference: the same where the runtime generates, as far as its tokens are transformers'.
    num_agreed: tokens before the first divergence.
    error: why there is nothing to compare; the differences are then infinite.
    """

    name: str
    num_prompt_tokens: int
    num_tokens: int
    forced_difference: float = math.inf
    free_difference: float = math.inf
    num_agreed: int = 0
    divergence: Divergence | None = None
    error: str | None = None

    def faults(self, tolerance: float) -> list[str]:
        """What is wrong with it, in words; empty if nothing is."""
        if self.error is not None:
            return [self.error]
        found = []
        measures = (("with its answer given", self.forced_difference), ("while generating", self.free_difference))
        for when, difference in measures:
            if not difference <= tolerance:  # not a number is a fault too
                found.append(f"log probabilities differ by {difference:.2g} {when}")
        lost = self.divergence
        if lost is not None and not lost.gap <= tolerance:
            found.append(f"token {lost.index} is {lost.got}, not {lost.expected}: its logit is {lost.gap:.2g} lower")
        return found


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What came of all probes. tolerance: for differences of log probabilities and for a divergence's gap."""

    tolerance: float
    probes: tuple[ProbeResult, ...]

    @property
    def faults(self) -> list[str]:
        return [f"probe {one.name}: {fault}" for one in self.probes for fault in one.faults(self.tolerance)]

    @property
    def passed(self) -> bool:
        return bool(self.probes) and not self.faults

    @property
    def max_difference(self) -> float:
        return _highest(d for one in self.probes for d in (one.forced_difference, one.free_difference))

    @property
    def max_gap(self) -> float:
        return _highest(one.divergence.gap for one in self.probes if one.divergence is not None)

    @property
    def agreement(self) -> float:
        """Share of the answers' tokens that come before their answer's first divergence."""
        return sum(one.num_agreed for one in self.probes) / sum(one.num_tokens for one in self.probes)


def compare(answers: Sequence[ReferenceAnswer], llm: LLM, *, tolerance: float, top: int) -> CheckReport:
    """Gives the probes to a runtime, twice: with transformers' answers for it to judge, and for it to answer.

    top: likeliest tokens to compare at each position, beside the token that stands there.
    """
    from dist_vlm import SamplingParams

    forced = llm.generate(
        [_forced_prompt(answer, llm) for answer in answers],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=top),
        use_tqdm=False,
    )
    free = llm.generate(
        [_with_pictures({"prompt": answer.prompt}, answer) for answer in answers],
        [
            SamplingParams(temperature=0, max_tokens=len(answer.token_ids), ignore_eos=True, logprobs=top)
            for answer in answers
        ],
        use_tqdm=False,
    )
    results = [_compared(*one, top=top) for one in zip(answers, forced, free, strict=True)]
    return CheckReport(tolerance, tuple(results))


def _forced_prompt(answer: ReferenceAnswer, llm: LLM) -> Any:
    """The prompt and its answer, up to a token that would count as a picture's placeholder."""
    placeholder = llm.config.vision.image_token_id
    given = answer.token_ids
    if placeholder in given:
        given = given[: given.index(placeholder)]
    return _with_pictures({"prompt_token_ids": [*answer.prompt_token_ids, *given]}, answer)


def _with_pictures(prompt: dict[str, Any], answer: ReferenceAnswer) -> Any:
    pictures = list(answer.probe.pictures)
    return prompt | {"multi_modal_data": {"image": pictures}} if pictures else prompt


def _compared(answer: ReferenceAnswer, forced: RequestOutput, free: RequestOutput, *, top: int) -> ProbeResult:
    name, num_prompt, num_tokens = answer.probe.name, len(answer.prompt_token_ids), len(answer.token_ids)
    error = forced.error or free.error or _problem(answer, forced, free, top=top)
    if error is not None:
        return ProbeResult(name, num_prompt, num_tokens, error=error)
    forced_told, free_told = forced.prompt_logprobs, free.outputs[0].logprobs
    assert forced_told is not None and free_told is not None, "checked above"
    agreed = _num_equal(free.outputs[0].token_ids, answer.token_ids)
    # The token that diverges was still chosen after transformers' tokens; those after it were not.
    comparable = free_told[: min(agreed + 1, num_tokens)]
    return ProbeResult(
        name,
        num_prompt,
        num_tokens,
        forced_difference=_difference(answer, forced_told[1:], start=0),
        free_difference=_difference(answer, comparable, start=num_prompt - 1),
        num_agreed=agreed,
        divergence=_divergence(answer, free.outputs[0].token_ids, agreed),
    )


def _problem(answer: ReferenceAnswer, forced: RequestOutput, free: RequestOutput, *, top: int) -> str | None:
    """What makes the outputs incomparable, if anything does."""
    tokens = free.outputs[0].token_ids
    if free.prompt_token_ids != answer.prompt_token_ids:
        return "the prompt becomes other tokens than in transformers"
    if len(tokens) != len(answer.token_ids):
        return f"{len(tokens)} tokens were generated in place of {len(answer.token_ids)}"
    # A prompt's first token has no distribution.
    wanted = ((forced.prompt_token_ids[1:], (forced.prompt_logprobs or [])[1:]), (tokens, free.outputs[0].logprobs))
    for at, told in wanted:
        whole = told is not None and len(told) == len(at)
        if not whole or any(
            entries is None or token not in entries or len(entries) < top
            for token, entries in zip(at, told or [], strict=True)
        ):
            return f"not every token came with the log probabilities of itself and the {top} likeliest"
    return None


def _num_equal(tokens: Sequence[int], expected: Sequence[int]) -> int:
    pairs = enumerate(zip(tokens, expected, strict=True))
    return next((index for index, (one, other) in pairs if one != other), len(expected))


def _divergence(answer: ReferenceAnswer, tokens: Sequence[int], index: int) -> Divergence | None:
    if index == len(answer.token_ids):
        return None
    row, got = answer.row(index), tokens[index]
    return Divergence(index, answer.token_ids[index], got, (row.max() - row[got]).item())


def _difference(answer: ReferenceAnswer, told: Sequence[Mapping[int, Any] | None], *, start: int) -> float:
    """The highest |difference| from the rows `start`, `start` + 1, ... of transformers' log probabilities."""
    entries = [
        (start + index, token, entry.logprob) for index, row in enumerate(told) for token, entry in (row or {}).items()
    ]
    rows, ids, logprobs = zip(*entries, strict=True)
    theirs = answer.logprobs[list(rows), list(ids)].double()
    return (torch.tensor(logprobs, dtype=torch.float64) - theirs).abs().max().item()


def _highest(values: Iterable[float]) -> float:
    """Not a number, if one of them is."""
    found = list(values)
    return math.nan if any(math.isnan(value) for value in found) else max(found, default=0.0)
