"""The step that is computed for nobody: as much as a step may have, and nothing is left of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dist_vlm.workers.comm import single_rank
from dist_vlm.workers.models import read_spec
from dist_vlm.workers.plan import Slice, StepPlan
from dist_vlm.workers.rehearsal import rehearsal_plans, rehearse
from dist_vlm.workers.runner import Runner
from tests.workers.test_runner import pixels, rank_config, sequence, step

ROWS = 16  # of an image of the tiny checkpoint


def started(model: Path, **changes: object) -> Runner:
    runner = Runner(rank_config(model, **changes), single_rank())
    runner.allocate(runner.load().num_blocks)
    return runner


@pytest.mark.parametrize(
    ("budget", "num_seqs", "max_model_len", "lengths", "num_images"),
    [
        (64, 4, 64, [48, 16], 2),  # an image each, the second without its text
        (64, 1, 64, [64], 1),  # the last sequence there can be has the rest
        (200, 8, 64, [48, 48, 48, 48, 8], 4),
        (64, 4, 20, [20, 20, 20, 4], 3),
        (15, 4, 64, [15], 0),  # no room for an image
        (1, 4, 64, [1], 0),
    ],
)
def test_a_step_is_as_full_as_one_may_be(
    tiny_checkpoint: Path, budget: int, num_seqs: int, max_model_len: int, lengths: list[int], num_images: int
) -> None:
    config = rank_config(
        tiny_checkpoint, max_num_batched_tokens=budget, max_num_seqs=num_seqs, max_model_len=max_model_len
    )
    plan, after = rehearsal_plans(read_spec(str(tiny_checkpoint)), config)
    assert [piece.count for piece in plan.slices] == lengths
    assert [len(new.token_ids) for new in plan.new] == lengths
    assert plan.num_tokens <= budget
    assert len(plan.encode) == len(set(plan.encode)) == num_images
    assert [span.image for new in plan.new for span in new.images] == list(plan.encode)
    assert all(span.end <= len(new.token_ids) and span.count == ROWS for new in plan.new for span in new.images)
    assert after.release == tuple(new.slot for new in plan.new)
    assert after.drop_features == plan.encode


def test_of_a_model_without_images_it_is_text(tiny_checkpoint: Path) -> None:
    spec = read_spec(str(tiny_checkpoint))
    text = dataclasses.replace(spec, image_input_shape=None, image_feature_size=None)
    plan, _ = rehearsal_plans(text, rank_config(tiny_checkpoint, max_num_batched_tokens=100))
    assert [piece.count for piece in plan.slices] == [64, 36]
    assert plan.encode == ()


def test_nothing_is_left_of_it_and_requests_get_the_same_tokens(tiny_checkpoint: Path) -> None:
    rehearsed, plain = started(tiny_checkpoint), started(tiny_checkpoint)
    rehearse(rehearsed)
    assert rehearsed.features.num_encoded == 2
    assert rehearsed.features.features == {}
    for runner in (rehearsed, plain):
        runner.stage("x", "pixel_values", pixels(3))
    plan = StepPlan(0, new=(sequence(0),), encode=("x",), slices=(Slice(0, 0, 19, (0, 1), True),))
    found, expected = step(rehearsed, plan), step(plain, plan)
    assert found.sampled == expected.sampled
    assert (found.step_id, found.counters.num_encoded_images) == (0, 1)
    with pytest.raises(KeyError):
        rehearsed.images.get("rehearsed 0")


def test_what_fails_in_it_is_told(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner = started(tiny_checkpoint)
    for weight in runner.vision.module.parameters():
        weight.data.fill_(torch.nan)
    rehearse(runner)
    assert "the rehearsal of a step failed" in caplog.text
    assert "features are not finite" in caplog.text
    good = sequence(0, tokens=(1, 5, 7), images=())
    assert step(runner, StepPlan(0, new=(good,), slices=(Slice(0, 0, 3, (0,), True),))).sampled[0].token_ids
