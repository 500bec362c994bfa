"""A rank's steps over a real checkpoint, plan by plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dist_vlm.workers.comm import single_rank
from dist_vlm.workers.config import RankConfig
from dist_vlm.workers.models import CheckpointError
from dist_vlm.workers.plan import ImageSpan, NewSequence, SamplingRow, Slice, StepPlan
from dist_vlm.workers.runner import Runner

PROMPT = (1, *(32000,) * 16, 500, 600)
IMAGE = (ImageSpan("x", 1, 16),)


def rank_config(model: Path, **changes: object) -> RankConfig:
    values: dict = {
        "model": str(model), "dtype": "float32", "device": "cpu", "load_format": "safetensors", "rank": 0,
        "world_size": 1, "block_size": 16, "max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64,
        "gpu_memory_utilization": 0.9, "kv_cache_bytes": 1 << 20, "num_threads": 1, "kernels": "torch",
        "share_gpu": False, "seed": 0,
    }  # fmt: skip
    return RankConfig(**(values | changes))


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> Runner:
    runner = Runner(rank_config(tiny_checkpoint), single_rank())
    report = runner.load()
    assert report.num_blocks == (1 << 20) // report.kv_block_bytes
    runner.allocate(report.num_blocks)
    return runner


def sequence(slot: int, tokens: tuple[int, ...] = PROMPT, images: tuple[ImageSpan, ...] = IMAGE) -> NewSequence:
    return NewSequence(slot, tokens, len(tokens), images, SamplingRow())


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, 3, 56, 56)).astype(np.float32)


def test_a_sampled_token_is_what_the_next_step_reads(loaded: Runner) -> None:
    """Told once and decoded from the rank's own memory, or told anew with the token: the same answer."""
    loaded.stage("x", "pixel_values", pixels(0))
    first = loaded.step(StepPlan(0, new=(sequence(0),), encode=("x",), slices=(Slice(0, 0, 19, (0, 1), True),)))
    (token,) = first.sampled[0].token_ids
    second = loaded.step(StepPlan(1, slices=(Slice(0, 19, 1, (), True),)))
    anew = sequence(1, (*PROMPT, token))
    third = loaded.step(StepPlan(2, new=(anew,), slices=(Slice(1, 0, 20, (2, 3), True),)))
    assert third.sampled[0].token_ids == second.sampled[0].token_ids
    assert (first.counters.num_encoded_images, second.counters.num_encoded_images) == (1, 0)
    loaded.step(StepPlan(3, release=(0, 1), drop_features=("x",)))
    loaded.unstage("x")


def test_a_slot_whose_image_failed_stays_idle_until_released(loaded: Runner) -> None:
    """The driver may have sent more of it before it learnt of the failure."""
    loaded.stage("bad", "pixel_values", pixels(0)[:, :2])
    loaded.stage("x", "pixel_values", pixels(0))
    broken = sequence(0, images=(ImageSpan("bad", 1, 16),))
    plan = StepPlan(0, new=(broken, sequence(1)), encode=("bad", "x"))
    slices = (Slice(0, 0, 19, (0, 1), True), Slice(1, 0, 19, (2, 3), True))
    result = loaded.step(StepPlan(0, new=plan.new, encode=plan.encode, slices=slices))
    assert [failure.image for failure in result.image_failures] == ["bad"]
    assert [sampled.slot for sampled in result.sampled] == [1]
    again = loaded.step(StepPlan(1, slices=(Slice(0, 19, 1, (), True), Slice(1, 19, 1, (), True))))
    assert [sampled.slot for sampled in again.sampled] == [1]
    only = loaded.step(StepPlan(2, slices=(Slice(0, 20, 1, (), True),)))
    assert only.sampled == ()
    final = loaded.step(
        StepPlan(3, release=(0, 1), new=(sequence(0, (5, 6), ()),), slices=(Slice(0, 0, 2, (4,), True),))
    )
    assert [sampled.slot for sampled in final.sampled] == [0]
    loaded.step(StepPlan(4, release=(0,), drop_features=("x",)))


def test_blocks_are_copied_before_the_slices_run(loaded: Runner) -> None:
    text = sequence(0, (5, 6, 7, 8), ())
    whole = loaded.step(StepPlan(0, new=(text,), slices=(Slice(0, 0, 4, (0,), True),))).sampled[0].token_ids
    loaded.step(StepPlan(1, release=(0,)))
    # The prompt's first three positions lie in a copy of the block; only the last is computed.
    copied = StepPlan(2, new=(text,), copy_blocks=((0, 9),), slices=(Slice(0, 3, 1, (9,), True),))
    assert loaded.step(copied).sampled[0].token_ids == whole
    loaded.step(StepPlan(3, release=(0,)))


def test_an_empty_plan_is_a_step(loaded: Runner) -> None:
    result = loaded.step(StepPlan(7))
    assert (result.step_id, result.sampled, result.counters.num_collectives) == (7, (), 0)


def test_missing_weights_are_named(tiny_facts: Path) -> None:
    with pytest.raises(CheckpointError, match="safetensors"):
        Runner(rank_config(tiny_facts), single_rank()).load()


def test_random_weights_need_no_file(tiny_facts: Path) -> None:
    runner = Runner(rank_config(tiny_facts, load_format="dummy"), single_rank())
    runner.load()
    runner.allocate(4)
    text = sequence(0, (5, 6, 7), ())
    assert runner.step(StepPlan(0, new=(text,), slices=(Slice(0, 0, 3, (0,), True),))).sampled
