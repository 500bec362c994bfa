"""Recorded decode steps against the same steps through the torch ops; without a GPU the kernels are interpreted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_vlm.workers.comm import single_rank
from dist_vlm.workers.decode import recorded_sizes
from dist_vlm.workers.plan import NewSequence, SamplingRow, Slice, StepPlan, StepResult
from dist_vlm.workers.runner import Runner

from .test_runner import rank_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = [tuple(range(100 + 37 * slot, 100 + 37 * slot + 3 + 5 * slot)) for slot in range(4)]
STEPS = 5


def make_runner(model: Path, kernels: str, **changes: object) -> Runner:
    runner = Runner(rank_config(model, kernels=kernels, device=DEVICE, **changes), single_rank())
    report = runner.load()
    runner.allocate(report.num_blocks)
    return runner


def answers(runner: Runner, samplings: list[SamplingRow], *, steps: int = STEPS) -> list[StepResult]:
    """A prefill of all slots, then decode steps, the last of them without slot 1; blocks come in odd order."""
    new = tuple(
        NewSequence(slot, PROMPTS[slot], len(PROMPTS[slot]), (), sampling) for slot, sampling in enumerate(samplings)
    )
    lengths = [len(prompt) for prompt in PROMPTS[: len(samplings)]]
    slices = tuple(Slice(slot, 0, length, (9 - slot, slot), True) for slot, length in enumerate(lengths))
    results = [runner.launch(StepPlan(0, new=new, slices=slices)).result()]
    for step in range(1, steps):
        running = [slot for slot in range(len(samplings)) if step < steps - 2 or slot != 1]
        slices = tuple(Slice(slot, lengths[slot] + step - 1, 1, (), True) for slot in running)
        results.append(runner.launch(StepPlan(step, slices=slices)).result())
    runner.launch(StepPlan(steps, release=tuple(range(len(samplings))))).result()
    return results


def tokens(results: list[StepResult]) -> list[tuple[tuple[int, tuple[int, ...]], ...]]:
    return [tuple((sampled.slot, sampled.token_ids) for sampled in result.sampled) for result in results]


@pytest.fixture(scope="module")
def recorded(tiny_checkpoint: Path) -> Runner:
    return make_runner(tiny_checkpoint, "triton")


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path) -> Runner:
    return make_runner(tiny_checkpoint, "torch")


@pytest.mark.parametrize("count", [1, 3])
def test_greedy_tokens_are_those_of_the_torch_ops(recorded: Runner, plain: Runner, count: int) -> None:
    samplings = [SamplingRow()] * count
    assert tokens(answers(recorded, samplings)) == tokens(answers(plain, samplings))


def test_options_of_single_rows(recorded: Runner, plain: Runner) -> None:
    samplings = [
        SamplingRow(),
        SamplingRow(temperature=1.5, seed=7),
        SamplingRow(repetition_penalty=5.0, logit_bias=((77, 3.0),)),
        SamplingRow(logprobs=2),
    ]
    ours, theirs = answers(recorded, samplings), answers(plain, samplings)
    assert tokens(ours) == tokens(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        for sampled, expected in zip(mine.sampled, other.sampled, strict=True):
            assert [entry.top_ids for entry in sampled.logprobs] == [entry.top_ids for entry in expected.logprobs]
            assert [entry.logprob for entry in sampled.logprobs] == pytest.approx(
                [entry.logprob for entry in expected.logprobs], abs=1e-4
            )


@torch.inference_mode()
def test_a_slot_with_logits_that_are_no_numbers_fails_alone(recorded: Runner) -> None:
    samplings = [SamplingRow()] * 3
    expected = tokens(answers(recorded, samplings, steps=4))[1]
    lengths = [len(prompt) for prompt in PROMPTS]
    new = tuple(NewSequence(slot, PROMPTS[slot], lengths[slot], (), SamplingRow()) for slot in range(3))
    slices = tuple(Slice(slot, 0, lengths[slot], (9 - slot, slot), True) for slot in range(3))
    recorded.launch(StepPlan(0, new=new, slices=slices)).result()
    keys = recorded.kv_cache.keys[0]
    keys[8, 0] = torch.nan  # slot 1's first block
    result = recorded.launch(
        StepPlan(1, slices=tuple(Slice(slot, lengths[slot], 1, (), True) for slot in range(3)))
    ).result()
    keys[8] = 0
    recorded.launch(StepPlan(2, release=(0, 1, 2))).result()
    assert [failure.slot for failure in result.slot_failures] == [1]
    assert [(sampled.slot, sampled.token_ids) for sampled in result.sampled] == [expected[0], expected[2]]


def test_blocks_appended_while_decoding(recorded: Runner, plain: Runner) -> None:
    """A sequence that grows over the end of its block, which is told in a decode step."""
    prompt = tuple(range(200, 214))
    found = []
    for runner in (recorded, plain):
        new = (NewSequence(0, prompt, len(prompt), (), SamplingRow()),)
        results = [runner.launch(StepPlan(0, new=new, slices=(Slice(0, 0, 14, (3,), True),))).result()]
        for position in range(14, 20):
            blocks = (5,) if position == 16 else ()
            piece = Slice(0, position, 1, blocks, True)
            results.append(runner.launch(StepPlan(position, slices=(piece,))).result())
        runner.launch(StepPlan(20, release=(0,))).result()
        found.append(tokens(results))
    assert found[0] == found[1]


def test_sizes_cover_every_batch() -> None:
    assert recorded_sizes(1) == [1]
    assert recorded_sizes(4) == [1, 2, 4]
    sizes = recorded_sizes(200)
    assert sizes == sorted(set(sizes)) and sizes[-1] == 200
    assert all(min(size for size in sizes if size >= count) - count < 16 for count in range(1, 201))
