"""Recorded steps of few tokens against the same steps through the torch ops; without a GPU they are interpreted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_vlm.workers.plan import SamplingRow, Slice, StepPlan, StepResult
from dist_vlm.workers.runner import Runner
from dist_vlm.workers.short_steps import MAX_SLICES, MAX_TOKENS

from .test_decode import make_runner, tokens
from .test_runner import IMAGE, pixels, sequence


@pytest.fixture(scope="module")
def recorded(tiny_checkpoint: Path) -> Runner:
    return make_runner(tiny_checkpoint, "triton")


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path) -> Runner:
    return make_runner(tiny_checkpoint, "torch")


def run(runner: Runner, plans: list[StepPlan]) -> list[StepResult]:
    runner.stage("x", "pixel_values", pixels(0))
    results = [runner.launch(plan).result() for plan in plans]
    runner.unstage("x")
    return results


def test_chunks_and_single_tokens_beside_each_other(recorded: Runner, plain: Runner) -> None:
    """A prompt cut through its image, while another sequence decodes: the first chunk samples nothing."""
    plans = [
        StepPlan(0, new=(sequence(2, (5, 6, 7), ()),), slices=(Slice(2, 0, 3, (7,), True),)),
        StepPlan(
            1,
            new=(sequence(0),),
            encode=("x",),
            slices=(Slice(0, 0, 11, (4, 1), False), Slice(2, 3, 1, (), True)),
        ),
        StepPlan(2, slices=(Slice(2, 4, 1, (), True), Slice(0, 11, 8, (), True))),
        StepPlan(3, release=(0, 2), drop_features=("x",)),
    ]
    found, expected = run(recorded, plans), run(plain, plans)
    assert tokens(found) == tokens(expected)
    assert [len(result.sampled) for result in found] == [1, 1, 2, 0]


def test_a_row_that_draws_and_one_that_tells_its_probabilities(recorded: Runner, plain: Runner) -> None:
    new = (
        sequence(0, (9, 8, 7), ()),
        sequence(1, (3, 4), ()),
    )
    new = tuple(
        type(one)(one.slot, one.token_ids, one.num_prompt_tokens, one.images, sampling)
        for one, sampling in zip(new, (SamplingRow(temperature=2.0, seed=3), SamplingRow(logprobs=1)), strict=True)
    )
    plans = [
        StepPlan(0, new=new, slices=(Slice(0, 0, 3, (1,), True), Slice(1, 0, 2, (2,), True))),
        StepPlan(1, release=(0, 1)),
    ]
    found, expected = run(recorded, plans), run(plain, plans)
    assert tokens(found) == tokens(expected)
    (ours,), (theirs,) = found[0].sampled[1].logprobs, expected[0].sampled[1].logprobs
    assert ours.top_ids == theirs.top_ids and ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@torch.inference_mode()
def test_a_slice_that_fails_leaves_the_others_alone(recorded: Runner) -> None:
    """Features of a wrong shape, which only laying out finds."""
    plans = [
        StepPlan(0, new=(sequence(0), sequence(1, (5, 6), ())), encode=("x",)),
        StepPlan(1, slices=(Slice(0, 0, 19, (4, 1), True), Slice(1, 0, 2, (2,), True))),
    ]
    runner = recorded
    run(runner, plans[:1])
    whole = runner.features.features[IMAGE[0].image]
    runner.features.features[IMAGE[0].image] = whole[:3]
    result = run(runner, plans[1:])[0]
    run(runner, [StepPlan(2, release=(0, 1), drop_features=("x",))])
    assert [failure.slot for failure in result.slot_failures] == [0]
    assert [sampled.slot for sampled in result.sampled] == [1]


@torch.inference_mode()
def test_a_size_recorded_ahead_is_not_recorded_again(
    recorded: Runner, plain: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = recorded._short_steps
    assert short is not None
    short.record([32, 40])
    monkeypatch.setattr(short, "_make", lambda size: pytest.fail(f"{size} tokens are recorded again"))
    prompt = tuple(range(7, 7 + 63))
    plans = [
        StepPlan(0, new=(sequence(0, prompt, ()),), slices=(Slice(0, 0, 63, (4, 1, 2, 3), True),)),
        StepPlan(1, release=(0,)),
    ]
    assert tokens(run(recorded, plans)) == tokens(run(plain, plans))


def test_what_fits(recorded: Runner) -> None:
    short = recorded._short_steps
    assert short is not None
    assert short.fits([Slice(0, 0, MAX_TOKENS - 1, (), True)])
    assert not short.fits([Slice(0, 0, MAX_TOKENS, (), True)])
    assert not short.fits([Slice(slot, 0, 1, (), True) for slot in range(MAX_SLICES + 1)])
