from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from examples.demo.checkpoint import Sizes, TextSizes, VisionSizes
from examples.demo.dataset import SIDES
from examples.demo.figures import FOLDER
from examples.demo.packing import SLOTS, Packer, attention_mask, position_ids
from examples.demo.questions import QA
from examples.demo.rows import Source, training_picture, training_rows
from examples.demo.tokenizer import load_tokenizer, prompt
from examples.demo.train import Settings, learning_rate, train

CHECKPOINT = FOLDER / "checkpoint"
TINY = Sizes(
    text=TextSizes(64, 128, 2, 4, 2, 16),
    vision=VisionSizes(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4),
)


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(seed=5, folder=CHECKPOINT, side=72, num_image_tokens=81)


def picture_of_row(source: Source, index: int) -> tuple[object, list[QA | None]]:
    rng = random.Random(f"train/{source.seed}/{index}")
    picture, asked = training_picture(rng)
    side = rng.randint(*SIDES)
    return picture.draw(side, side), asked


def test_rows_do_not_depend_on_the_number_of_processes(source: Source) -> None:
    alone, shared = (training_rows(source, 510, processes=n) for n in (1, 2))
    for one, two in zip(
        (alone.pictures, alone.tokens, alone.targets), (shared.pictures, shared.tokens, shared.targets), strict=True
    ):
        assert np.array_equal(one, two)


def test_a_packed_row_is_what_each_question_meets_alone(source: Source) -> None:
    """Pictures, tokens, positions and mask together: logits of the slots against the processor's whole prompt."""
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT)
    processor = AutoProcessor.from_pretrained(CHECKPOINT, backend="pil")
    prefix = Packer(load_tokenizer(CHECKPOINT), source.num_image_tokens).prefix()
    rows = training_rows(source, 1, processes=1)
    image, asked = picture_of_row(source, 0)
    prompts = [prompt(qa.question) for qa in asked if qa is not None]
    tokens = torch.tensor([prefix + rows.tokens[0].tolist()])
    with torch.no_grad():
        first = processor(text=prompts[0], images=image, return_tensors="pt")
        packed = model(
            input_ids=tokens,
            pixel_values=first["pixel_values"],
            attention_mask=attention_mask(len(prefix)),
            position_ids=position_ids(len(prefix)),
        ).logits[0]
        start = len(prefix)
        for qa, length in zip(asked, SLOTS, strict=True):
            if qa is not None:
                alone = processor(text=prompt(qa.question), images=image, return_tensors="pt")
                ids = alone["input_ids"][0].tolist()
                end = start + len(ids) - len(prefix)
                assert ids == prefix + tokens[0, start:end].tolist()
                assert rows.targets[0, end - len(prefix) - 1] == packed[end - 1].argmax()
                torch.testing.assert_close(packed[end - 1], model(**alone).logits[0, -1], atol=1e-3, rtol=1e-4)
            start += length
    assert len(prompts) >= 6


def test_rows_hold_the_pixels_the_image_processor_makes(source: Source) -> None:
    processor = AutoProcessor.from_pretrained(CHECKPOINT, backend="pil").image_processor
    rows = training_rows(source, 8, processes=1)
    mean, std = (np.array(x, np.float32) for x in (processor.image_mean, processor.image_std))
    for index in range(8):
        image, _ = picture_of_row(source, index)
        expected = processor(images=image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        np.testing.assert_allclose((rows.pictures[index] / 255 - mean) / std, expected, atol=1e-5)


def test_a_question_too_long_for_its_slot_is_refused(source: Source) -> None:
    packer = Packer(load_tokenizer(CHECKPOINT), source.num_image_tokens)
    long = QA("count", "How many shapes are there? " * 5, "one")
    with pytest.raises(ValueError, match="its slot 24"):
        packer.pack([long] + [None] * (len(SLOTS) - 1))
    with pytest.raises(ValueError, match="1 questions, a row has 7 slots"):
        packer.pack([long])


def test_learning_rate_rises_then_falls_to_zero() -> None:
    settings = Settings(out=Path(), steps=100, warm_up=10, learning_rate=1.0)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001


@pytest.mark.timeout(100)
def test_a_few_steps_lower_the_loss_and_write_a_checkpoint(tmp_path: Path) -> None:
    out, figures = tmp_path / "checkpoint", tmp_path / "figures.json"
    settings = Settings(
        out=out, figures=figures, steps=12, batch=8, pictures=60, warm_up=3, learning_rate=3e-3, held_out=10,
        report_every=12, processes=1, device="cpu", commit="none", sizes=TINY,
    )  # fmt: skip
    said: list[str] = []
    losses = train(settings, said.append)
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < 0.85 * np.mean(losses[:3])
    assert any(line.startswith("step 12 ") for line in said)
    model, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    written = json.loads(figures.read_text())["training"]
    assert written["parameters"] == sum(p.numel() for p in model.parameters())
    assert written["steps"] == 12
