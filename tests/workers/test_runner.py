"""A rank's steps over a real checkpoint, plan by plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_vlm.executor.agreement import agreed
from dist_vlm.workers import pack as pack_module
from dist_vlm.workers import runner as runner_module
from dist_vlm.workers import wire
from dist_vlm.workers.comm import single_rank
from dist_vlm.workers.config import RankConfig
from dist_vlm.workers.models import CheckpointError
from dist_vlm.workers.plan import ImageSpan, NewSequence, SamplingRow, Slice, StepPlan, StepResult
from dist_vlm.workers.runner import Runner

PROMPT = (1, *(32000,) * 16, 500, 600)
IMAGE = (ImageSpan("x", 1, 16),)


def rank_config(model: Path, **changes: object) -> RankConfig:
    values: dict = {
        "model": str(model), "dtype": "float32", "device": "cpu", "load_format": "safetensors", "rank": 0,
        "world_size": 1, "block_size": 16, "max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64,
        "gpu_memory_utilization": 0.9, "kv_cache_bytes": 1 << 20, "num_threads": 1, "kernels": "torch",
        "share_gpu": False, "collectives": "group",
        "collectives_table": None, "halve_step_tokens": None, "seed": 0, "feature_cache_tokens": 256,
        "vision_data_parallel": True,
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


def step(runner: Runner, plan: StepPlan) -> StepResult:
    return runner.launch(plan).result()


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, 3, 56, 56)).astype(np.float32)


def test_a_sampled_token_is_what_the_next_step_reads(loaded: Runner) -> None:
    """Told once and decoded from the rank's own memory, or told anew with the token: the same answer."""
    loaded.stage("x", "pixel_values", pixels(0))
    first = step(loaded, StepPlan(0, new=(sequence(0),), encode=("x",), slices=(Slice(0, 0, 19, (0, 1), True),)))
    (token,) = first.sampled[0].token_ids
    second = step(loaded, StepPlan(1, slices=(Slice(0, 19, 1, (), True),)))
    anew = sequence(1, (*PROMPT, token))
    third = step(loaded, StepPlan(2, new=(anew,), slices=(Slice(1, 0, 20, (2, 3), True),)))
    assert third.sampled[0].token_ids == second.sampled[0].token_ids
    assert (first.counters.num_encoded_images, second.counters.num_encoded_images) == (1, 0)
    step(loaded, StepPlan(3, release=(0, 1), drop_features=("x",)))
    loaded.unstage("x")


def test_a_slot_whose_image_failed_stays_idle_until_released(loaded: Runner) -> None:
    """The driver may have sent more of it before it learnt of the failure."""
    loaded.stage("bad", "pixel_values", pixels(0)[:, :2])
    loaded.stage("x", "pixel_values", pixels(0))
    broken = sequence(0, images=(ImageSpan("bad", 1, 16),))
    plan = StepPlan(0, new=(broken, sequence(1)), encode=("bad", "x"))
    slices = (Slice(0, 0, 19, (0, 1), True), Slice(1, 0, 19, (2, 3), True))
    result = step(loaded, StepPlan(0, new=plan.new, encode=plan.encode, slices=slices))
    assert [failure.image for failure in result.image_failures] == ["bad"]
    assert [sampled.slot for sampled in result.sampled] == [1]
    again = step(loaded, StepPlan(1, slices=(Slice(0, 19, 1, (), True), Slice(1, 19, 1, (), True))))
    assert [sampled.slot for sampled in again.sampled] == [1]
    only = step(loaded, StepPlan(2, slices=(Slice(0, 20, 1, (), True),)))
    assert only.sampled == ()
    final = step(
        loaded, StepPlan(3, release=(0, 1), new=(sequence(0, (5, 6), ()),), slices=(Slice(0, 0, 2, (4,), True),))
    )
    assert [sampled.slot for sampled in final.sampled] == [0]
    step(loaded, StepPlan(4, release=(0,), drop_features=("x",)))


def test_blocks_are_copied_before_the_slices_run(loaded: Runner) -> None:
    text = sequence(0, (5, 6, 7, 8), ())
    whole = step(loaded, StepPlan(0, new=(text,), slices=(Slice(0, 0, 4, (0,), True),))).sampled[0].token_ids
    step(loaded, StepPlan(1, release=(0,)))
    # The prompt's first three positions lie in a copy of the block; only the last is computed.
    copied = StepPlan(2, new=(text,), copy_blocks=((0, 9),), slices=(Slice(0, 3, 1, (9,), True),))
    assert step(loaded, copied).sampled[0].token_ids == whole
    step(loaded, StepPlan(3, release=(0,)))


def test_an_empty_plan_is_a_step(loaded: Runner) -> None:
    result = step(loaded, StepPlan(7))
    assert (result.step_id, result.sampled, result.counters.num_collectives) == (7, (), 0)


def test_missing_weights_are_named(tiny_facts: Path) -> None:
    with pytest.raises(CheckpointError, match="safetensors"):
        Runner(rank_config(tiny_facts), single_rank()).load()


def test_random_weights_need_no_file(tiny_facts: Path) -> None:
    runner = Runner(rank_config(tiny_facts, load_format="dummy"), single_rank())
    runner.load()
    runner.allocate(4)
    text = sequence(0, (5, 6, 7), ())
    assert step(runner, StepPlan(0, new=(text,), slices=(Slice(0, 0, 3, (0,), True),))).sampled


TEXTS = {slot: tuple(100 + 7 * slot + i for i in range(5 + slot)) for slot in range(3)}


def three_texts(step_id: int, **sampling: object) -> StepPlan:
    """Three sequences of text, prefilled at once; `sampling` is slot 1's."""
    new = tuple(
        NewSequence(slot, text, len(text), (), SamplingRow(**sampling) if slot == 1 else SamplingRow())
        for slot, text in TEXTS.items()
    )
    return StepPlan(step_id, new=new, slices=tuple(Slice(s, 0, len(text), (s,), True) for s, text in TEXTS.items()))


def tokens_by_slot(result: StepResult) -> dict[int, tuple[int, ...]]:
    return {item.slot: item.token_ids for item in result.sampled}


@pytest.fixture
def quiet(loaded: Runner) -> dict[int, tuple[int, ...]]:
    """What the three answer when nothing goes wrong."""
    tokens = tokens_by_slot(step(loaded, three_texts(0)))
    step(loaded, StepPlan(1, release=(0, 1, 2)))
    return tokens


def test_an_error_in_pack_fails_its_slot_alone(
    loaded: Runner, quiet: dict[int, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pack_module._feature_rows

    def failing(slices, starts, slots, features, without_images, width):
        if any(piece.slot == 1 and piece.slot not in without_images for piece in slices):
            raise KeyError("planted")
        return real(slices, starts, slots, features, without_images, width)

    monkeypatch.setattr(pack_module, "_feature_rows", failing)
    result = step(loaded, three_texts(0))
    step(loaded, StepPlan(1, release=(0, 1, 2)))
    assert [failure.slot for failure in result.slot_failures] == [1]
    assert "could not be made part of a batch" in result.slot_failures[0].reason
    assert tokens_by_slot(result) == {0: quiet[0], 2: quiet[2]}


def test_an_error_in_sampling_fails_its_slot_alone(
    loaded: Runner, quiet: dict[int, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runner_module.sample_tokens

    def failing(logits, rows, **others):
        if any(row.slot == 1 for row in rows):
            raise RuntimeError("planted")
        return real(logits, rows, **others)

    monkeypatch.setattr(runner_module, "sample_tokens", failing)
    result = step(loaded, three_texts(0))
    step(loaded, StepPlan(1, release=(0, 1, 2)))
    assert [(f.slot, f.reason) for f in result.slot_failures] == [(1, "its next token could not be sampled")]
    assert tokens_by_slot(result) == {0: quiet[0], 2: quiet[2]}


def test_logits_that_are_not_finite_fail_their_slot_alone(
    loaded: Runner, quiet: dict[int, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loaded.language.logits

    def poisoned(hidden: torch.Tensor, **_: object) -> torch.Tensor:
        logits = real(hidden)
        logits[1, 3] = float("nan")
        return logits

    monkeypatch.setattr(loaded.language, "logits", poisoned)
    result = step(loaded, three_texts(0))
    step(loaded, StepPlan(1, release=(0, 1, 2)))
    assert [(f.slot, f.reason) for f in result.slot_failures] == [(1, "the model's logits are not finite numbers")]
    assert tokens_by_slot(result) == {0: quiet[0], 2: quiet[2]}


def test_a_logits_processor_that_raises_fails_its_slot_alone(loaded: Runner, quiet: dict[int, tuple[int, ...]]) -> None:
    def broken(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    loaded.processors["p"] = (broken,)
    result = step(loaded, three_texts(0, processors="p"))
    step(loaded, StepPlan(1, release=(0, 1, 2)))
    del loaded.processors["p"]
    assert [failure.slot for failure in result.slot_failures] == [1]
    assert tokens_by_slot(result) == {0: quiet[0], 2: quiet[2]}


def test_prompt_log_probabilities_are_the_same_in_one_piece_and_in_chunks(loaded: Runner) -> None:
    """Against the row-by-row softmax of the model's own logits, and whatever the chunks."""
    text = tuple(range(300, 309))
    asks = NewSequence(0, text, 9, (), SamplingRow(prompt_logprobs=2, logprobs=1))
    whole = step(loaded, StepPlan(0, new=(asks,), slices=(Slice(0, 0, 9, (0,), True),)))
    step(loaded, StepPlan(1, release=(0,)))
    (told,) = whole.prompt_logprobs
    assert (told.slot, told.start, len(told.entries)) == (0, 1, 8)
    assert [len(entry.top_ids) for entry in told.entries] == [2] * 8
    pieces, start = [], 0
    for index, count in enumerate((2, 1, 6)):
        new, blocks = ((asks,), (0,)) if index == 0 else ((), ())
        piece = Slice(0, start, count, blocks, start + count == 9)
        pieces += step(loaded, StepPlan(2 + index, new=new, slices=(piece,))).prompt_logprobs
        start += count
    step(loaded, StepPlan(5, release=(0,)))
    assert [piece.start for piece in pieces] == [1, 3, 4]
    cut = [entry for piece in pieces for entry in piece.entries]
    assert [entry.rank for entry in cut] == [entry.rank for entry in told.entries]
    assert [entry.logprob for entry in cut] == pytest.approx([entry.logprob for entry in told.entries], abs=1e-5)
    (sampled,) = whole.sampled
    assert sampled.logprobs[0].top_ids == sampled.token_ids and sampled.logprobs[0].rank == 1
    # Each prompt token's own log probability is that of sampling after the tokens before it.
    shorter = NewSequence(0, text[:4], 4, (), SamplingRow(logprobs=20))
    alone = step(loaded, StepPlan(6, new=(shorter,), slices=(Slice(0, 0, 4, (0,), True),))).sampled[0].logprobs[0]
    step(loaded, StepPlan(7, release=(0,)))
    assert told.entries[3].top_ids == alone.top_ids[:2]
    assert told.entries[3].top_logprobs == pytest.approx(alone.top_logprobs[:2], abs=1e-5)


def test_a_cached_beginning_gives_the_same_token_as_computing_it(loaded: Runner) -> None:
    text = tuple(range(400, 420))
    first = step(loaded, StepPlan(0, new=(sequence(0, text, ()),), slices=(Slice(0, 0, 20, (3, 4), True),)))
    shared = step(loaded, StepPlan(1, new=(sequence(1, text, ()),), slices=(Slice(1, 16, 4, (3, 5), True),)))
    assert tokens_by_slot(shared)[1] == tokens_by_slot(first)[0]
    step(loaded, StepPlan(2, release=(0, 1)))


def test_of_images_found_guilty_when_the_step_has_ended_nothing_is_left_once_dropped(
    loaded: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded, "_encodes_later", True)
    loaded.stage("bad", "pixel_values", np.full_like(pixels(0), np.nan))
    loaded.stage("wrong", "pixel_values", pixels(0)[:, :2])
    loaded.stage("x", "pixel_values", pixels(0))
    new = (
        sequence(0, images=(ImageSpan("bad", 1, 16),)),
        sequence(1),
        sequence(2, images=(ImageSpan("wrong", 1, 16),)),
    )
    slices = tuple(Slice(slot, 0, 19, (2 * slot, 2 * slot + 1), True) for slot in range(3))
    result = step(loaded, StepPlan(0, new=new, encode=("bad", "x", "wrong"), slices=slices))
    assert {failure.image: failure.reason for failure in result.image_failures} == {
        "bad": "the image's features are not finite numbers",
        "wrong": "the image could not be encoded",
    }
    assert 1 in tokens_by_slot(result) and 0 not in tokens_by_slot(result)
    # What was sent before the driver learnt of it is computed, and means nothing.
    later = step(loaded, StepPlan(1, slices=(Slice(2, 19, 1, (), True), Slice(1, 19, 1, (), True))))
    assert 1 in tokens_by_slot(later)
    monkeypatch.setattr(loaded, "_encodes_later", False)
    loaded.stage("good", "pixel_values", pixels(0))
    plain = (sequence(0, images=(ImageSpan("good", 1, 16),)),)
    plan = StepPlan(2, release=(0, 2), new=plain, encode=("good",), slices=(Slice(0, 0, 19, (0, 1), True),))
    assert tokens_by_slot(step(loaded, plan))[0] == tokens_by_slot(result)[1]
    step(loaded, StepPlan(3, release=(0, 1), drop_features=("bad", "wrong", "x", "good")))
    assert loaded.features.features == {}


def test_ranks_agree_on_log_probabilities_that_are_no_numbers(loaded: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chunk that samples nothing, behind an image whose features are not finite, which nobody knows yet."""
    monkeypatch.setattr(loaded, "_encodes_later", True)
    loaded.stage("bad", "pixel_values", np.full_like(pixels(0), np.nan))
    asking = NewSequence(0, PROMPT, len(PROMPT), (ImageSpan("bad", 1, 16),), SamplingRow(prompt_logprobs=1))
    first = step(loaded, StepPlan(0, new=(asking,), encode=("bad",), slices=(Slice(0, 0, 12, (0,), False),)))
    then = step(loaded, StepPlan(1, slices=(Slice(0, 12, 6, (1,), False),)))  # sent before the first was read
    step(loaded, StepPlan(2, release=(0,), drop_features=("bad",)))
    for result in (first, then):
        assert result.prompt_logprobs == ()
        assert [(failure.slot, failure.reason) for failure in result.slot_failures] == [
            (0, "the model's logits are not finite numbers")
        ]
        copies = [dataclasses.replace(wire.decode(StepResult, wire.encode(result)), rank=rank) for rank in range(2)]
        assert agreed(copies, result.step_id) == copies[0]
    assert [failure.image for failure in first.image_failures] == ["bad"]
