"""Comparison with answers whose differences are known, because they were planted in an engine of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dist_vlm.launch.compare import CheckReport, Divergence, ProbeResult, compare
from dist_vlm.launch.probes import Probe
from dist_vlm.launch.reference import ReferenceAnswer
from dist_vlm.outputs import CompletionOutput, Logprob, RequestOutput

VOCAB, TOP = 50, 3
PROMPT, LENGTH = [3, 4, 5, 6], 5
IMAGE_ID = 49


def logits_of(seed: int) -> Tensor:
    """One row for each token but the first of prompt and answer."""
    return torch.randn(len(PROMPT) + LENGTH - 1, VOCAB, generator=torch.Generator().manual_seed(seed))


def answer_of(logits: Tensor, *, pictures: Sequence[Image.Image] = ()) -> ReferenceAnswer:
    tokens = logits[len(PROMPT) - 1 :].argmax(-1).tolist()
    probe = Probe("a probe", "what?", tuple(pictures))
    return ReferenceAnswer(probe, "the prompt", list(PROMPT), tokens, torch.log_softmax(logits, dim=-1))


class NumberLLM:
    """Answers from logits: those given, whatever it is asked to judge or to answer."""

    def __init__(self, logits: Tensor, *, tokens: list[int] | None = None) -> None:
        self.config = SimpleNamespace(vision=SimpleNamespace(image_token_id=IMAGE_ID))
        self.logprobs = torch.log_softmax(logits, dim=-1)
        self.tokens = logits[len(PROMPT) - 1 :].argmax(-1).tolist() if tokens is None else tokens
        self.forced_prompt_ids: list[int] = []
        self.inputs: list[Any] = []

    def told(self, row: int, token: int, top: int) -> dict[int, Logprob]:
        ids = {token, *self.logprobs[row].topk(top).indices.tolist()}
        return {one: Logprob(self.logprobs[row, one].item()) for one in ids}

    def generate(self, prompts: list[Any], params: Any, use_tqdm: bool) -> list[RequestOutput]:
        self.inputs += prompts
        assert not use_tqdm
        if not isinstance(params, list):
            return [self.judge(prompt["prompt_token_ids"], params) for prompt in prompts]
        return [self.free(one) for one in params]

    def judge(self, token_ids: list[int], params: Any) -> RequestOutput:
        self.forced_prompt_ids = token_ids
        told = [self.told(row, token, params.prompt_logprobs) for row, token in enumerate(token_ids[1:])]
        answer = CompletionOutput(0, "", [1], finish_reason="length")
        return RequestOutput("0", None, token_ids, [answer], finished=True, prompt_logprobs=[None, *told])

    def free(self, params: Any) -> RequestOutput:
        assert params.is_greedy and params.ignore_eos and params.max_tokens == LENGTH
        rows = range(len(PROMPT) - 1, len(PROMPT) - 1 + len(self.tokens))
        told = [self.told(row, token, params.logprobs) for row, token in zip(rows, self.tokens, strict=True)]
        answer = CompletionOutput(0, "", list(self.tokens), logprobs=told, finish_reason="length")
        return RequestOutput("1", "the prompt", list(PROMPT), [answer], finished=True)


def checked(answer: ReferenceAnswer, llm: NumberLLM, tolerance: float = 1e-3) -> CheckReport:
    return compare([answer], llm, tolerance=tolerance, top=TOP)  # type: ignore[arg-type]


def test_the_same_numbers_pass() -> None:
    logits = logits_of(0)
    picture = Image.new("RGB", (2, 2))
    answer, llm = answer_of(logits, pictures=[picture]), NumberLLM(logits)
    report = checked(answer, llm)
    (probe,) = report.probes
    assert report.passed and report.faults == []
    assert (probe.num_prompt_tokens, probe.num_tokens, probe.num_agreed) == (4, 5, 5)
    assert max(probe.forced_difference, probe.free_difference) < 1e-6
    assert probe.divergence is None
    assert (report.agreement, report.max_gap) == (1.0, 0.0)
    assert llm.inputs == [
        {"prompt_token_ids": PROMPT + answer.token_ids, "multi_modal_data": {"image": [picture]}},
        {"prompt": "the prompt", "multi_modal_data": {"image": [picture]}},
    ]


def test_what_all_logits_of_a_row_have_in_common_is_no_difference() -> None:
    logits = logits_of(0)
    report = checked(answer_of(logits), NumberLLM(logits + torch.arange(len(logits)).unsqueeze(1)))
    assert report.passed
    assert report.max_difference < 1e-5


@pytest.mark.parametrize(("row", "free"), [(0, False), (2, False), (3, True), (7, True)])
def test_one_wrong_logit_anywhere_is_measured(row: int, free: bool) -> None:
    """Rows 0 to 2 are the prompt's, 3 to 7 the answer's: a generated answer has those alone."""
    logits, wrong = logits_of(1), logits_of(1)
    best = logits[row].argmax()
    wrong[row, best] += 0.5
    expected = (torch.log_softmax(wrong, -1) - torch.log_softmax(logits, -1))[row].abs()
    reported = {int(best), (PROMPT[1:] + answer_of(logits).token_ids)[row], *wrong[row].topk(TOP).indices.tolist()}
    highest = max(expected[token].item() for token in reported)
    (probe,) = checked(answer_of(logits), NumberLLM(wrong)).probes
    assert probe.forced_difference == pytest.approx(highest, abs=1e-6)
    assert probe.free_difference == (pytest.approx(highest, abs=1e-6) if free else pytest.approx(0, abs=1e-6))
    assert len(probe.faults(1e-3)) == 1 + free
    assert probe.faults(1.0) == []


def test_another_token_is_told_with_its_gap_and_what_follows_is_not_compared() -> None:
    logits = logits_of(2)
    answer = answer_of(logits)
    second = logits[4].topk(2).indices[1].item()
    # After the divergence the engine is of another opinion, and may be.
    other = logits.clone()
    other[5:] = logits_of(3)[5:]
    llm = NumberLLM(other, tokens=[answer.token_ids[0], second, 7, 8, 9])
    (probe,) = checked(answer, llm).probes
    gap = (logits[4].max() - logits[4, second]).item()
    assert probe.num_agreed == 1
    lost = probe.divergence
    assert lost is not None
    assert (lost.index, lost.expected, lost.got) == (1, answer.token_ids[1], second)
    assert lost.gap == pytest.approx(gap, abs=1e-6)
    assert probe.free_difference < 1e-6
    assert probe.forced_difference > 0.5
    fault = f"token 1 is {second}, not {answer.token_ids[1]}: its logit is"
    assert any(one.startswith(fault) for one in probe.faults(gap * 0.99))
    assert not any(one.startswith(fault) for one in probe.faults(gap * 1.01))


def test_a_number_that_is_none_never_passes() -> None:
    logits = logits_of(0)
    llm = NumberLLM(logits)
    llm.logprobs[2, logits[2].argmax()] = math.nan
    report = checked(answer_of(logits), llm, tolerance=1e9)
    assert not report.passed
    assert math.isnan(report.max_difference)


def spoilt(change: Any) -> NumberLLM:
    """An engine whose outputs `change` changes."""
    llm = NumberLLM(logits_of(0))
    generate = llm.generate

    def changed(*args: Any, **kwargs: Any) -> list[RequestOutput]:
        outputs = generate(*args, **kwargs)
        change(outputs[0])
        return outputs

    llm.generate = changed  # type: ignore[method-assign]
    return llm


def _fail(output: RequestOutput) -> None:
    output.error = "no room"


def _shorten(output: RequestOutput) -> None:
    if output.prompt_logprobs is None:
        output.outputs[0].token_ids.pop()


def _other_prompt(output: RequestOutput) -> None:
    if output.prompt_logprobs is None:
        output.prompt_token_ids = [3, 4, 5, 7]


def _no_logprobs(output: RequestOutput) -> None:
    output.outputs[0].logprobs = None


def _no_prompt_logprobs(output: RequestOutput) -> None:
    output.prompt_logprobs = None


def _one_row_less(output: RequestOutput) -> None:
    if output.prompt_logprobs is not None:
        output.prompt_logprobs.pop()


def _without_the_token(output: RequestOutput) -> None:
    if output.outputs[0].logprobs is not None:
        del output.outputs[0].logprobs[3][output.outputs[0].token_ids[3]]


def _fewer_alternatives(output: RequestOutput) -> None:
    if output.prompt_logprobs is not None:
        row, token = output.prompt_logprobs[2], output.prompt_token_ids[2]
        assert row is not None
        output.prompt_logprobs[2] = {token: row[token]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_fail, "no room"),
        (_shorten, "4 tokens were generated in place of 5"),
        (_other_prompt, "the prompt becomes other tokens than in transformers"),
        (_no_logprobs, "not every token came with"),
        (_no_prompt_logprobs, "not every token came with"),
        (_one_row_less, "not every token came with"),
        (_without_the_token, "not every token came with"),
        (_fewer_alternatives, "not every token came with"),
    ],
)
def test_what_cannot_be_compared_is_a_fault(change: Any, message: str) -> None:
    report = checked(answer_of(logits_of(0)), spoilt(change))
    assert not report.passed
    (fault,) = report.faults
    assert fault.startswith(f"probe a probe: {message}")
    assert report.agreement == 0


def test_an_answer_is_given_up_to_what_would_be_a_pictures_place() -> None:
    logits = logits_of(0)
    logits[5, IMAGE_ID] = 100.0
    answer, llm = answer_of(logits), NumberLLM(logits)
    assert answer.token_ids[2] == IMAGE_ID
    assert checked(answer, llm).passed
    assert llm.forced_prompt_ids == PROMPT + answer.token_ids[:2]


def test_agreement_and_gaps_are_over_all_probes() -> None:
    probes = (
        ProbeResult("a", 9, 4, 0.1, 0.2, num_agreed=4),
        ProbeResult("b", 9, 4, 0.3, 0.1, num_agreed=1, divergence=Divergence(1, 5, 6, 0.25)),
    )
    report = CheckReport(0.3, probes)
    assert (report.agreement, report.max_difference, report.max_gap) == (5 / 8, 0.3, 0.25)
    assert report.passed
    assert len(CheckReport(0.2, probes).faults) == 2


def test_no_probe_is_no_pass() -> None:
    assert not CheckReport(1.0, ()).passed
