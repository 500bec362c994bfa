from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration

from examples.demo import samples
from examples.demo.dataset import held_out_examples, is_held_out
from examples.demo.evaluate import Answer, Reply, Verdict, ask_all, main, summarize, transformers_answer
from examples.demo.figures import FOLDER
from examples.demo.tokenizer import prompt

CHECKPOINT = FOLDER / "checkpoint"
PICTURES = FOLDER / "pictures"
ENTRIES: list[dict[str, str]] = json.loads((PICTURES / "questions.json").read_text())


@pytest.fixture(scope="module")
def answer() -> Answer:
    return transformers_answer(CHECKPOINT, "cpu")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((CHECKPOINT / "config.json").read_text())


def shipped(name: str) -> Image.Image:
    with Image.open(PICTURES / name) as image:
        return image.convert("RGB")


def test_it_is_at_most_12_megabytes() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 12_000_000
    assert sum(path.stat().st_size for path in PICTURES.iterdir()) <= 200_000


def test_its_heads_split_over_four_ranks(config: dict[str, Any]) -> None:
    text = config["text_config"]
    assert text["num_attention_heads"] % 4 == 0
    assert text["num_key_value_heads"] % 4 == 0
    assert text["num_attention_heads"] > text["num_key_value_heads"]
    assert text["intermediate_size"] % 8 == 0
    assert config["image_seq_length"] % 16 != 0  # an image ends inside a block


def test_it_loads_whole_in_float32_from_bfloat16() -> None:
    model, info = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.dtype == torch.float32
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as stored:
        names = set(stored.keys())
        assert {stored.get_slice(name).get_dtype() for name in names} == {"BF16"}
        head = stored.get_tensor("language_model.lm_head.weight")
    assert torch.equal(model.lm_head.weight, head.float())
    figures = json.loads((FOLDER / "figures.json").read_text())
    assert figures["training"]["parameters"] == sum(p.numel() for p in model.parameters())


def test_its_tokenizer_takes_any_text(config: dict[str, Any]) -> None:
    processor = AutoProcessor.from_pretrained(CHECKPOINT, backend="pil")
    text = "Größe 42, 何色ですか? \t\n🙂 {}"
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    assert processor.tokenizer.decode(ids) == text
    assert len(processor.tokenizer) <= config["text_config"]["vocab_size"]


def test_a_prompt_by_the_chat_template_is_the_prompt_of_training() -> None:
    processor = AutoProcessor.from_pretrained(CHECKPOINT, backend="pil")
    content = [{"type": "image"}, {"type": "text", "text": "Count the shapes."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == prompt("Count the shapes.")
    inputs = processor(text=text, images=shipped("count.png"), return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert ids[0] == processor.tokenizer.bos_token_id
    assert ids.count(processor.image_token_id) == 81


def test_the_shipped_samples_are_answered_exactly(answer: Answer) -> None:
    said = [answer([entry["prompt"]], [shipped(entry["image"])])[0] for entry in ENTRIES]
    assert [reply.text for reply in said] == [entry["answer"] for entry in ENTRIES]
    end = AutoProcessor.from_pretrained(CHECKPOINT, backend="pil").tokenizer.eos_token_id
    assert all(reply.token_ids[-1] == end for reply in said)


def test_answers_come_from_the_picture(answer: Answer) -> None:
    """The same question about four shipped scenes: four descriptions, and each names what its own picture shows."""
    kinds = ("count", "beside", "describe", "describe_places")
    images = [shipped(f"{kind.replace('_', '-')}.png") for kind in kinds]
    said = [reply.text for reply in answer([prompt("Describe the picture.")] * 4, images)]
    assert len(set(said)) == 4
    assert said[2] == ENTRIES[4]["answer"]


def test_forty_held_out_pictures(answer: Answer) -> None:
    summary = summarize(ask_all(answer, held_out_examples(40, seed=7)))
    assert summary["asked"] == 40
    assert summary["exact_match"] >= 0.95


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry["image"] for entry in ENTRIES])
def test_a_shipped_sample_is_the_one_that_its_script_draws(entry: dict[str, str]) -> None:
    kind, width, height = next(s for s in samples.SAMPLES if f"{s[0].replace('_', '-')}.png" == entry["image"])
    picture, qa = samples.sample(kind)
    assert is_held_out(picture.key)
    assert (entry["question"], entry["answer"], entry["prompt"]) == (qa.question, qa.answer, prompt(qa.question))
    # a pixel or two on an edge may differ from one version of Pillow to the next
    difference = np.asarray(picture.draw(width, height), np.float32) - np.asarray(shipped(entry["image"]), np.float32)
    assert np.abs(difference).mean() < 0.5


def test_the_figures_meet_what_is_promised() -> None:
    figures = json.loads((FOLDER / "figures.json").read_text())
    for found in figures["evaluation"].values():
        assert found["asked"] == 500
        assert found["right"] == sum(int(part.split("/")[0]) for part in found["by_kind"].values())
        assert found["exact_match"] >= 0.95


def test_the_runtime_gave_the_tokens_of_transformers() -> None:
    """Measured on all 500; `tests/parity` asks again, about fewer."""
    evaluation = json.loads((FOLDER / "figures.json").read_text())["evaluation"]
    digests = {evaluation[backend]["tokens_digest"] for backend in ("transformers", "one-rank", "two-ranks")}
    assert len(digests) == 1


def test_only_the_exact_text_counts_as_right() -> None:
    example = held_out_examples(1, seed=0)[0]
    wanted = example.qa.answer
    said = [wanted, f" {wanted}", f"{wanted}.", wanted.upper(), ""]
    assert [Verdict(example, Reply(text, ())).is_right for text in said] == [True, False, False, False, False]


def test_the_evaluation_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    path.write_text('{"training": {"seed": 3}}')
    main(["--count", "5", "--device", "cpu", "--figures", str(path), "--label", "mine", "--commit", "abc"])
    written = json.loads(path.read_text())
    assert written["training"] == {"seed": 3}
    assert written["evaluation"]["mine"]["asked"] == 5
    assert written["evaluation"]["mine"]["commit"] == "abc"
    assert "of 5 answered exactly" in capsys.readouterr().out
