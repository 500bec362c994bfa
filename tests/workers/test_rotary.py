"""Every rotary type of transformers, beyond the original length, against transformers' own stepwise generation."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dist_vlm.workers.rotary import RotaryFrequencies, rope_types

from .models.llava.rig import Driver, build_ranks, llava_config, random_model, random_tokens

HALF = 6  # of the head size of 12
TYPES = {
    "default": {"rope_theta": 500.0},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0 + 0.1 * i for i in range(HALF)],
        "long_factor": [2.0 + 0.7 * i for i in range(HALF)],
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}
PROMPT_LENGTHS = {"short": 11, "long": 23}


def test_every_type_of_transformers_is_covered() -> None:
    assert set(TYPES) == set(rope_types())


def stepwise_logits(model, tokens: list[int], num_prompt_tokens: int) -> torch.Tensor:
    """transformers' logits of the prompt's last token and of each token after it, with its own cache."""
    out = model(input_ids=torch.tensor([tokens[:num_prompt_tokens]]), use_cache=True)
    logits = [out.logits[0, -1]]
    for token in tokens[num_prompt_tokens:]:
        out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0, -1])
    return torch.stack(logits)


def our_logits(path, tokens: list[int], num_prompt_tokens: int, *, chunk: int) -> torch.Tensor:
    driver = Driver(build_ranks(path))
    sequence = driver.sequence(tokens[:num_prompt_tokens], room=len(tokens) - num_prompt_tokens)
    other = driver.sequence(random_tokens(40, seed=9))
    logits = torch.empty(0)
    for start in range(0, num_prompt_tokens, chunk):
        end = min(start + chunk, num_prompt_tokens)
        logits = driver.run([(other, 0, 5), (sequence, start, end)], rows=[5 + end - start - 1])
    parts = [logits]
    for position in range(num_prompt_tokens, len(tokens)):
        sequence.tokens.append(tokens[position])
        parts.append(driver.run([(sequence, position, position + 1)]))
    return torch.cat(parts)


@pytest.fixture(scope="module", params=TYPES)
def checkpoint(request, tmp_path_factory):
    """(directory, rope type); max_position_embeddings is 16, so that every run passes it."""
    parameters = {"rope_type": request.param, "rope_theta": 10000.0, **TYPES[request.param]}
    config = llava_config(max_position_embeddings=16, rope_parameters=parameters)
    path = tmp_path_factory.mktemp(request.param)
    random_model(config).save_pretrained(path)
    return path, request.param


def fresh_model(path):
    """transformers' model without the state that its rotary module keeps between calls."""
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)


@pytest.mark.parametrize("num_prompt_tokens", PROMPT_LENGTHS.values(), ids=PROMPT_LENGTHS)
def test_generation_past_the_original_length_equals_transformers(checkpoint, num_prompt_tokens) -> None:
    path, _ = checkpoint
    tokens = random_tokens(30, seed=4)
    expected = stepwise_logits(fresh_model(path), tokens, num_prompt_tokens)
    whole = our_logits(path, tokens, num_prompt_tokens, chunk=64)
    torch.testing.assert_close(whole, expected, atol=2e-4, rtol=2e-4)
    chunked = our_logits(path, tokens, num_prompt_tokens, chunk=5)
    torch.testing.assert_close(chunked, whole, atol=2e-5, rtol=2e-5)


def test_the_type_changes_the_logits(checkpoint, tmp_path) -> None:
    """Guards the comparisons above: were the scaling dropped on both sides, they would still agree."""
    path, rope_type = checkpoint
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 9000.0}
    for file in path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = random_tokens(30, seed=4)
    ours, plain = (our_logits(place, tokens, 23, chunk=64) for place in (path, tmp_path))
    assert (ours - plain).abs().max() > 1e-2, rope_type


def test_old_and_new_spelling_of_the_parameters_are_read_alike(checkpoint, tmp_path) -> None:
    """`rope_theta` and `rope_scaling` beside the other fields, as files before transformers 5 have them."""
    path, rope_type = checkpoint
    if rope_type == "proportional":
        pytest.skip("newer than the old spelling")
    config = json.loads((path / "config.json").read_text())
    scaling = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = scaling.pop("rope_theta")
    config["text_config"]["rope_scaling"] = None if rope_type == "default" else scaling
    for file in path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = random_tokens(26, seed=6)
    new, old = (our_logits(place, tokens, 23, chunk=64) for place in (path, tmp_path))
    assert torch.equal(new, old)


def test_the_default_type_is_computed_from_its_base_alone() -> None:
    parameters = {"rope_type": "default", "rope_theta": 500.0}
    text = llava_config(max_position_embeddings=16, rope_parameters=parameters).text_config
    sizes = {"head_dim": 2 * HALF, "dtype": torch.float32, "device": torch.device("cpu")}
    plain = RotaryFrequencies(SimpleNamespace(rope_parameters=parameters, head_dim=2 * HALF), **sizes)
    cos, sin = plain(torch.tensor([0, 3, 39]), torch.tensor([4, 4, 40]))
    expected = LlamaRotaryEmbedding(text)(torch.zeros(1), torch.tensor([[0, 3, 39]]))
    assert torch.equal(cos, expected[0][0])
    assert torch.equal(sin, expected[1][0])


def test_a_table_of_positions_changes_nothing(checkpoint) -> None:
    path, _ = checkpoint
    sizes = {"head_dim": 2 * HALF, "dtype": torch.float32, "device": torch.device("cpu")}
    config = fresh_model(path).config.text_config
    plain, kept = RotaryFrequencies(config, **sizes), RotaryFrequencies(config, **sizes)
    kept.tabulate(40)
    positions, lengths = torch.tensor([0, 3, 17, 39]), torch.tensor([4, 4, 18, 40])
    assert all(torch.equal(*pair) for pair in zip(plain(positions, lengths), kept(positions, lengths), strict=True))
