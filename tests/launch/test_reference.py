"""transformers as the check asks it, against transformers asked otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from dist_vlm.config import EngineConfig, resolve
from dist_vlm.launch.probes import Probe, make_probes
from dist_vlm.launch.reference import Reference
from dist_vlm.workers.models import get_family

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "checkpoint"
NUM_TOKENS = 6


def config_of(checkpoint: Path, **fields: Any) -> EngineConfig:
    return resolve(EngineConfig.from_fields(model=str(checkpoint), device="cpu", **fields))


@pytest.fixture(scope="module")
def model() -> Any:
    return LlavaForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(config_of(DEMO), device="cpu")


def one_pass(model: Any, checkpoint: Path, token_ids: list[int], pictures: tuple[Image.Image, ...]) -> torch.Tensor:
    """Log probabilities [tokens, vocabulary] from a single forward over all tokens."""
    inputs = {"input_ids": torch.tensor([token_ids])}
    if pictures:
        processor = AutoProcessor.from_pretrained(checkpoint, backend="pil").image_processor
        inputs["pixel_values"] = processor(images=list(pictures), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        return torch.log_softmax(model(**inputs).logits[0], dim=-1)


@pytest.mark.parametrize("index", [0, 2, 3])
def test_every_row_is_that_of_a_single_pass_and_every_token_its_likeliest(
    index: int, reference: Reference, model: Any
) -> None:
    probe = make_probes(4, max_pictures=2)[index]
    answer = reference.answer(probe, num_tokens=NUM_TOKENS)
    tokens = answer.prompt_token_ids + answer.token_ids
    assert len(answer.token_ids) == NUM_TOKENS
    assert answer.prompt_token_ids.count(493) == 81 * len(probe.pictures)
    assert answer.logprobs.shape == (len(tokens) - 1, 512)
    expected = one_pass(model, DEMO, tokens, probe.pictures)[:-1]
    torch.testing.assert_close(answer.logprobs, expected, atol=1e-4, rtol=0)
    assert expected[len(answer.prompt_token_ids) - 1 :].argmax(-1).tolist() == answer.token_ids
    for place in range(NUM_TOKENS):
        assert torch.equal(answer.row(place), answer.logprobs[len(answer.prompt_token_ids) - 1 + place])


def test_the_prompt_is_the_checkpoints_template(reference: Reference) -> None:
    probe = Probe("x", "What?", (Image.new("RGB", (9, 9)), Image.new("RGB", (9, 9))))
    assert reference.answer(probe, num_tokens=1).prompt == "USER: <image>\n<image>\nWhat? ASSISTANT:"


def changed(checkpoint: Path, folder: Path, **files: str | None) -> Path:
    """A copy of a checkpoint in which some JSON files are others, or gone (None)."""
    copy = folder / "changed"
    shutil.copytree(checkpoint, copy)
    for name, text in files.items():
        (copy / name.replace("__", ".")).unlink(missing_ok=True)
        if text is not None:
            (copy / name.replace("__", ".")).write_text(text)
    return copy


def test_generation_settings_of_the_checkpoint_do_not_count(reference: Reference, tmp_path: Path) -> None:
    probe = make_probes(1, max_pictures=1)[0]
    expected = reference.answer(probe, num_tokens=NUM_TOKENS)
    eos = expected.token_ids[1]
    settings = f'{{"do_sample": true, "repetition_penalty": 1.9, "eos_token_id": {eos}, "max_new_tokens": 2}}'
    copy = changed(DEMO, tmp_path, generation_config__json=settings)
    answer = Reference(config_of(copy), device="cpu").answer(probe, num_tokens=NUM_TOKENS)
    assert answer.token_ids == expected.token_ids


def test_without_a_template_it_is_the_familys_and_without_that_pictures_go_before_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = json.loads((DEMO / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    copy = changed(
        DEMO,
        tmp_path,
        chat_template__jinja=None,
        chat_template__json=None,
        tokenizer_config__json=json.dumps(settings),
    )
    probe = Probe("x", "What?", (Image.new("RGB", (9, 9)),))
    familys = Reference(config_of(copy), device="cpu")
    assert familys.answer(probe, num_tokens=1).prompt == "USER: <image>\nWhat? ASSISTANT:"
    monkeypatch.setattr(type(get_family("llava")), "chat_template", None)
    assert Reference(config_of(copy), device="cpu").answer(probe, num_tokens=1).prompt == "<image>\nWhat?"


def test_weights_are_rounded_as_the_runtime_rounds_them_and_computed_in_float32(tiny_checkpoint: Path) -> None:
    probe = make_probes(1, max_pictures=1)[0]
    answer = Reference(config_of(tiny_checkpoint, dtype="bfloat16"), device="cpu").answer(probe, num_tokens=2)
    tokens = answer.prompt_token_ids + answer.token_ids
    model = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    unrounded = one_pass(model, tiny_checkpoint, tokens, probe.pictures)[:-1]
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    rounded = one_pass(model, tiny_checkpoint, tokens, probe.pictures)[:-1]
    assert (answer.logprobs - unrounded).abs().max() > 0.01
    torch.testing.assert_close(answer.logprobs, rounded, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("dtype", "low", "high"), [("float16", 1e-3, 0.1), ("bfloat16", 0.02, 1)])
def test_what_transformers_loses_in_16_bits(dtype: str, low: float, high: float) -> None:
    """Significands have 11 bits in float16 and 8 in bfloat16, whose differences are some eight times as large."""
    reference = Reference(config_of(DEMO, dtype=dtype), device="cpu")
    answers = [reference.answer(probe, num_tokens=1) for probe in make_probes(3, max_pictures=1)]
    assert low < reference.own_difference(answers, dtype, top=5) < high
