"""Tensor parallelism is real: what each rank holds, what loading cost it, and how often the ranks meet in a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_vlm.sampling import SamplingParams

from .cases import noise_cases
from .ranks import Ranks


def text_config(checkpoint: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())["text_config"]
    return config


def shard_parameters(text: dict[str, Any], num_ranks: int) -> int:
    """A Llama shard by closed formula: query heads, KV heads (at least one), MLP width and vocabulary divided."""
    hidden, head = text["hidden_size"], text["head_dim"]
    queries = text["num_attention_heads"] // num_ranks * head
    keys = max(1, text["num_key_value_heads"] // num_ranks) * head
    width = text["intermediate_size"] // num_ranks
    vocab = -(-text["vocab_size"] // num_ranks)
    layer = hidden * (2 * queries + 2 * keys) + 3 * hidden * width + 2 * hidden
    return text["num_hidden_layers"] * layer + 2 * vocab * hidden + hidden


def tower_parameters(vision: dict[str, Any], hidden: int) -> int:
    """A CLIP tower without its last layer and post norm, and the two-layer projector."""
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    positions = (vision["image_size"] // patch) ** 2 + 1
    embeddings = width + 3 * patch * patch * width + positions * width
    layer = 4 * (width * width + width) + 2 * width * inner + width + inner + 4 * width
    projector = width * hidden + hidden + hidden * hidden + hidden
    return embeddings + 2 * width + (vision["num_hidden_layers"] - 1) * layer + projector


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_each_rank_holds_its_share(num_ranks: int, ranks: Ranks, tiny_checkpoint: Path) -> None:
    text = text_config(tiny_checkpoint)
    vision = json.loads((tiny_checkpoint / "config.json").read_text())["vision_config"]
    llm, _ = ranks.engine(tiny_checkpoint, num_ranks=num_ranks)
    reports = llm.executor_info.reports
    assert [report.rank for report in reports] == list(range(num_ranks))
    for report in reports:
        assert report.num_language_parameters == shard_parameters(text, num_ranks)
        assert report.num_vision_parameters == tower_parameters(vision, text["hidden_size"])
        # Keys and values, 2 layers, 16 positions, float32; of 2 KV heads a rank has 2, 1 and a copy of 1.
        assert report.kv_block_bytes == 2 * 2 * 16 * {1: 2, 2: 1, 4: 1}[num_ranks] * 32 * 4
        assert report.num_blocks == int(0.125 * 2**30) // report.kv_block_bytes


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_ranks_meet_as_often_as_the_layers_ask(num_ranks: int, ranks: Ranks, tiny_checkpoint: Path) -> None:
    """Two all-reduces a layer and one of the slices' status; where tokens are sampled, one of their rows and a gather
    of their logits; where an image is encoded, a vote."""
    llm, loan = ranks.engine(tiny_checkpoint, num_ranks=num_ranks, budget=10)
    case = noise_cases(with_images=True)[0]
    prompt: Any = {"prompt": case.prompt, "multi_modal_data": {"image": case.image}}
    llm.generate([prompt, "text alone"], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    layers = text_config(tiny_checkpoint)["num_hidden_layers"]
    seen = set()
    for plan, result in zip(loan.plans, loan.results, strict=True):
        samples = any(piece.sample for piece in plan.slices)
        expected = 2 * layers + 1 + 2 * samples + bool(plan.encode)
        assert result.counters.num_collectives == (expected if num_ranks > 1 else 0)
        seen.add((samples, bool(plan.encode)))
    assert {samples for samples, _ in seen} == {True, False}
    assert {encodes for _, encodes in seen} == {True, False}


@pytest.mark.timeout(300)
def test_loading_takes_little_more_memory_than_the_shard(ranks: Ranks, small_checkpoint: Path) -> None:
    """212 million parameters in bfloat16 over two ranks, so that the weights outweigh everything else."""
    llm, _ = ranks.engine(small_checkpoint, num_ranks=2, dtype="bfloat16")
    for report in llm.executor_info.reports:
        shard, tower = 2 * report.num_language_parameters, 2 * report.num_vision_parameters
        assert report.num_language_parameters == shard_parameters(text_config(small_checkpoint), 2)
        assert report.weight_bytes == shard + tower
        assert 0.95 * (shard + tower) < report.peak_load_bytes <= 1.2 * shard + tower
