"""Faults with no request's name on them: the guilty request fails alone, the others answer as in a quiet run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_vlm.engine.answer_log import AnswerLog
from dist_vlm.executor.inline import InlineExecutor
from dist_vlm.llm import LLM
from dist_vlm.sampling import SamplingParams
from dist_vlm.workers import pack as pack_module
from dist_vlm.workers import runner as runner_module
from dist_vlm.workers.coded_pixels import decoded

from .cases import noise_cases
from .test_parity import prompt_of

GUILTY = 2
PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def plant_in_preprocess(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are prepared several at once: the guilty one is told by its pixels."""
    processor = llm._front.processor._images._processor
    real, guilty = processor.preprocess, noise_cases(with_images=True)[GUILTY].image

    def preprocess(image: Any, **others: Any) -> np.ndarray:
        if image == guilty:
            raise MemoryError("planted")
        return real(image, **others)

    monkeypatch.setattr(processor, "preprocess", preprocess)


def plant_in_encode(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the batched encode, which does not know whose picture is whose: the guilty one is told by its pixels."""
    vision = runner_of(llm).vision
    cases = noise_cases(with_images=True)
    guilty = torch.from_numpy(decoded(llm._front.processor._images._processor.preprocess(cases[GUILTY].image)))
    real = vision.encode_pixels

    def encode_pixels(pixels: torch.Tensor) -> torch.Tensor:
        if any(torch.equal(one, guilty[0]) for one in pixels):
            raise RuntimeError("planted")
        return real(pixels)

    monkeypatch.setattr(vision, "encode_pixels", encode_pixels)


def plant_in_encode_told_later(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU does: the step goes on, and what failed is known when it has ended."""
    monkeypatch.setattr(runner_of(llm), "_encodes_later", True)
    plant_in_encode(llm, monkeypatch)


def plant_in_features(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guilty one's are not finite, which is known when the step has ended."""
    runner = runner_of(llm)
    monkeypatch.setattr(runner, "_encodes_later", True)
    cases = noise_cases(with_images=True)
    guilty = torch.from_numpy(decoded(llm._front.processor._images._processor.preprocess(cases[GUILTY].image)))
    real = runner.vision.encode_pixels

    def encode_pixels(pixels: torch.Tensor) -> torch.Tensor:
        is_guilty = torch.tensor([torch.equal(one, guilty[0]) for one in pixels])
        return real(pixels).masked_fill(is_guilty[:, None, None], torch.nan)

    monkeypatch.setattr(runner.vision, "encode_pixels", encode_pixels)


def plant_in_pack(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    real, guilty = pack_module._feature_rows, []

    def feature_rows(slices: Any, starts: Any, slots: Any, features: Any, without_images: Any, width: int) -> Any:
        for piece in slices:
            if piece.slot == GUILTY and not guilty:
                guilty.append(slots.sequence(piece.slot))  # another request may get the slot later
            if any(slots.sequence(piece.slot) is one for one in guilty) and piece.slot not in without_images:
                raise KeyError("planted")
        return real(slices, starts, slots, features, without_images, width)

    monkeypatch.setattr(pack_module, "_feature_rows", feature_rows)


def plant_in_sample(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    real, guilty = runner_module.sample_tokens, []

    def sample_tokens(logits: torch.Tensor, rows: Any, **others: Any) -> torch.Tensor:
        for row in rows:
            if row.slot == GUILTY and not guilty:
                guilty.append(row.sampling)
            if any(row.sampling is one for one in guilty) and row.position > row.num_prompt_tokens + 2:
                raise RuntimeError("planted")
        return real(logits, rows, **others)

    monkeypatch.setattr(runner_module, "sample_tokens", sample_tokens)


def plant_in_detokenize(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    real, logs = AnswerLog.take, []

    def take(self: AnswerLog, *news: Any, **others: Any) -> Any:
        if self not in logs:
            logs.append(self)
        if logs.index(self) == GUILTY:
            raise UnicodeError("planted")
        return real(self, *news, **others)

    monkeypatch.setattr(AnswerLog, "take", take)


def runner_of(llm: LLM) -> runner_module.Runner:
    executor = llm._core._executor
    assert isinstance(executor, InlineExecutor)
    return executor._worker._runner


@pytest.mark.parametrize(
    ("plant", "cause"),
    [
        (plant_in_preprocess, "could not be prepared"),
        (plant_in_encode, "could not be encoded"),
        (plant_in_encode_told_later, "could not be encoded"),
        (plant_in_features, "features are not finite"),
        (plant_in_pack, "could not be made part of a batch"),
        (plant_in_sample, "could not be sampled"),
        (plant_in_detokenize, "could not be detokenized"),
    ],
    ids=["preprocess", "encode", "encode told later", "features", "pack", "sample", "detokenize"],
)
@pytest.mark.parametrize("steps", [1, 2])
def test_the_guilty_request_alone_fails(
    plant: Callable[[LLM, pytest.MonkeyPatch], None],
    cause: str,
    steps: int,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = [prompt_of(case, "pixels", tiny_checkpoint) for case in noise_cases(with_images=True)[:6]]
    with LLM(
        str(tiny_checkpoint), executor="inline", device="cpu", max_model_len=256, max_num_seqs=8,
        kv_cache_memory_gib=0.0625, max_num_batched_tokens=64, max_steps_in_flight=steps,
        enable_prefix_caching=False, feature_cache_tokens=0,
    ) as llm:  # fmt: skip
        quiet = [output.outputs[0].token_ids for output in llm.generate(prompts, PARAMS, use_tqdm=False)]
        plant(llm, monkeypatch)
        outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
        failed = [index for index, output in enumerate(outputs) if output.error is not None]
        assert len(failed) == 1
        assert cause in str(outputs[failed[0]].error) and "planted" not in str(outputs[failed[0]].error)
        for index, output in enumerate(outputs):
            if index not in failed:
                assert output.outputs[0].token_ids == quiet[index]
        monkeypatch.undo()
        after = [output.outputs[0].token_ids for output in llm.generate(prompts, PARAMS, use_tqdm=False)]
        assert after == quiet
        assert llm._core.scheduler.pool.num_held == 0
