"""Logits against transformers' own model in float32, over chunkings, ranks and block tables."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from dist_vlm.kernels import few_rows_triton
from dist_vlm.kernels.choice import choose
from dist_vlm.kernels.linear_triton import linear_triton
from dist_vlm.workers.comm import single_rank
from dist_vlm.workers.models import CheckpointError, get_family, read_spec

from . import rig
from .rig import CPU, IMAGE_ID, OPS, Driver, build_ranks, llava_config, random_model, random_tokens

TOLERANCE = 1e-4
SHAPES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 24},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "odd vocabulary": {"vocab_size": 101},
}


def expected_logits(model, tokens: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([tokens])).logits[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, request):
    """(directory, transformers' model) of the text fields in the parameter."""
    model = random_model(llava_config(**request.param))
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    return path, model


@pytest.mark.parametrize("checkpoint", SHAPES.values(), ids=SHAPES.keys(), indirect=True)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_single_pass_equals_transformers(checkpoint, world_size) -> None:
    path, model = checkpoint
    driver = Driver(build_ranks(path, world_size=world_size))
    tokens = random_tokens(29)
    logits = driver.run([(driver.sequence(tokens), 0, 29)])
    torch.testing.assert_close(logits, expected_logits(model, tokens), atol=TOLERANCE, rtol=TOLERANCE)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("checkpoint", [{}], ids=["gqa"], indirect=True)
@pytest.mark.parametrize(("kernels", "world_size"), [("torch", 1), ("reference", 1), ("torch", 2)])
def test_mixed_chunks_then_decode_equal_transformers(checkpoint, kernels, world_size) -> None:
    """Two sequences in uneven chunks, beside each other, then token by token in one batch."""
    path, model = checkpoint
    driver = Driver(build_ranks(path, kernels=kernels, world_size=world_size, block_size=8))
    first, second = driver.sequence(random_tokens(37, seed=1)), driver.sequence(random_tokens(20, seed=2))
    expected = [expected_logits(model, sequence.tokens) for sequence in (first, second)]
    close = {"atol": TOLERANCE, "rtol": TOLERANCE}
    torch.testing.assert_close(driver.run([(first, 0, 7)]), expected[0][:7], **close)
    both = driver.run([(second, 0, 9), (first, 7, 30)])
    torch.testing.assert_close(both, torch.cat((expected[1][:9], expected[0][7:30])), **close)
    mixed = driver.run([(first, 30, 31), (second, 9, 13)])
    torch.testing.assert_close(mixed, torch.cat((expected[0][30:31], expected[1][9:13])), **close)
    for step in range(6):
        logits = driver.run([(first, 31 + step, 32 + step), (second, 13 + step, 14 + step)])
        torch.testing.assert_close(logits, torch.stack((expected[0][31 + step], expected[1][13 + step])), **close)


@pytest.mark.parametrize("checkpoint", [{}], ids=["gqa"], indirect=True)
@pytest.mark.parametrize("world_size", [1, 2])
def test_pictures_equal_transformers(checkpoint, world_size) -> None:
    """A picture and a question through tower, projector and language model, cut inside the picture."""
    path, model = checkpoint
    ranks = build_ranks(path, world_size=world_size)
    vision = build_vision(path)
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(5))
    driver, question = Driver(ranks), random_tokens(6, seed=3)
    tokens = [1, 2, *[IMAGE_ID] * 4, *question, *[IMAGE_ID] * 4, 7]
    expected = model(input_ids=torch.tensor([tokens]), pixel_values=pixels).logits[0]
    features = vision.encode_pixels(pixels).flatten(0, 1)
    sequence = driver.sequence(tokens, features=features)
    parts = [driver.run([(sequence, start, end)]) for start, end in ((0, 4), (4, 13), (13, 17))]
    torch.testing.assert_close(torch.cat(parts), expected, atol=TOLERANCE, rtol=TOLERANCE)
    swapped = driver.sequence(tokens, features=features.flip(0))
    assert not torch.allclose(driver.run([(swapped, 0, 17)])[-1], expected[-1], atol=0.01)


def build_vision(path):
    from dist_vlm.workers.safetensors_source import SafetensorsSource

    spec = read_spec(str(path))
    family = get_family(spec.family)
    vision = family.build_vision(spec, ops=OPS, dtype=torch.float32, device=CPU)
    with SafetensorsSource(path) as source:
        family.load_vision(vision, spec, source)
    return vision


@pytest.mark.parametrize("checkpoint", [{}], ids=["gqa"], indirect=True)
def test_collectives_are_counted(checkpoint) -> None:
    path, _ = checkpoint
    ranks = build_ranks(path, world_size=2)
    driver = Driver(ranks)
    sequence = driver.sequence(random_tokens(10))
    driver.run([(sequence, 0, 4)], rows=[])
    counts = [(comm.count.all_reduce, comm.count.all_gather) for comm in ranks.comms]
    assert counts == [(2 * 2, 0)] * 2
    logits = driver.run([(sequence, 4, 10)], rows=[5])
    assert logits.shape == (1, 99)
    assert [(comm.count.all_reduce, comm.count.all_gather) for comm in ranks.comms] == [(4 + 5, 1)] * 2


@pytest.mark.parametrize("checkpoint", [{}], ids=["gqa"], indirect=True)
def test_only_the_rows_asked_for_come_back(checkpoint) -> None:
    path, model = checkpoint
    driver = Driver(build_ranks(path))
    tokens = random_tokens(12)
    sequence = driver.sequence(tokens)
    assert driver.run([(sequence, 0, 12)], rows=[]).shape == (0, 99)
    logits = driver.run([(sequence, 0, 12)], rows=[11, 3])
    torch.testing.assert_close(logits, expected_logits(model, tokens)[[11, 3]], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("checkpoint", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"], indirect=True)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_parameter_counts_follow_the_formula(checkpoint, world_size) -> None:
    path, model = checkpoint
    text = model.config.text_config
    hidden, head_dim = text.hidden_size, text.head_dim
    kv_heads = max(1, text.num_key_value_heads // world_size)
    per_layer = (
        2 * hidden
        + hidden * head_dim * (2 * text.num_attention_heads // world_size + 2 * kv_heads)
        + 3 * hidden * text.intermediate_size // world_size
    )
    vocabulary = -(-text.vocab_size // world_size) * hidden * (1 if text.tie_word_embeddings else 2)
    for rank in build_ranks(path, world_size=world_size).models:
        count = sum(parameter.numel() for parameter in rank.module.parameters())
        assert count == text.num_hidden_layers * per_layer + hidden + vocabulary


@pytest.mark.parametrize("checkpoint", [{}], ids=["gqa"], indirect=True)
def test_kv_heads_are_replicated_where_ranks_are_more(checkpoint) -> None:
    path, model = checkpoint
    layer = model.model.language_model.layers[0].self_attn
    for rank, shard in enumerate(build_ranks(path, world_size=4).models):
        qkv = shard.module.layers[0].qkv.weight
        head = rank // 2
        assert torch.equal(qkv[:12], layer.q_proj.weight[rank * 12 : (rank + 1) * 12])
        assert torch.equal(qkv[12:24], layer.k_proj.weight[head * 12 : (head + 1) * 12])
        assert torch.equal(qkv[24:], layer.v_proj.weight[head * 12 : (head + 1) * 12])


@pytest.mark.parametrize(
    ("checkpoint", "world_size", "message"),
    [
        ({}, 3, "num_attention_heads is 4"),
        ({"intermediate_size": 55}, 2, "intermediate_size is 55"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 4}, 2, "num_key_value_heads is 3"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 4}, 4, "num_key_value_heads is 3"),
    ],
    indirect=["checkpoint"],
)
def test_shapes_that_do_not_divide_are_refused_by_name(checkpoint, world_size, message) -> None:
    with pytest.raises(CheckpointError, match=f"{message}.*world_size {world_size}"):
        build_ranks(checkpoint[0], world_size=world_size)


def test_unknown_rope_type_is_refused_by_name(tmp_path) -> None:
    model = random_model(llava_config())
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"rope_type": "default"', '"rope_type": "spiral"'))
    spec = read_spec(str(tmp_path))
    with pytest.raises(CheckpointError, match="rope_type is 'spiral', must be one of default, "):
        get_family("llava").build_language(
            spec, comm=single_rank(), ops=choose("torch", CPU), dtype=torch.float32, device=CPU
        )


@pytest.mark.gpu
@pytest.mark.parametrize("checkpoint", [{}], ids=["gqa"], indirect=True)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float16, 0.1), (torch.bfloat16, 0.5)])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_gpu_computes_what_the_cpu_does(checkpoint, dtype, tolerance, kernels) -> None:
    """Steps of 39, 17 and 2 rows."""
    path, model = checkpoint
    ranks = build_ranks(path, dtype=dtype, device=torch.device("cuda"), kernels=kernels)
    driver, tokens = Driver(ranks), random_tokens(37, seed=1)
    sequence, other = driver.sequence(tokens), driver.sequence(random_tokens(20, seed=2))
    parts = [driver.run([(other, 0, 9), (sequence, 0, 30)])[9:], driver.run([(other, 9, 10), (sequence, 30, 36)])[1:]]
    logits = torch.cat([*parts, driver.run([(sequence, 36, 37), (other, 10, 11)])[:1]]).cpu()
    torch.testing.assert_close(logits, expected_logits(model, tokens), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("checkpoint", [{}], ids=["gqa"], indirect=True)
def test_products_of_few_rows_make_the_model(checkpoint, monkeypatch) -> None:
    """In float16, all products by the kernels of a GPU, without one interpreted: steps of 39, 17 and 2 rows."""
    path, model = checkpoint
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("the GPU has no tensor memory accelerator")
    calls = []

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert few_rows_triton.takes(x, weight)
        calls.append(x.shape[0])
        return linear_triton(x, weight, bias)

    monkeypatch.setattr(rig, "choose", lambda *_: dataclasses.replace(choose("torch", device), linear=linear))
    driver, tokens = Driver(build_ranks(path, dtype=torch.float16, device=device)), random_tokens(37, seed=1)
    sequence, other = driver.sequence(tokens), driver.sequence(random_tokens(21, seed=2))
    parts = [driver.run([(other, 0, 9), (sequence, 0, 30)])[9:], driver.run([(other, 9, 20), (sequence, 30, 36)])[11:]]
    logits = torch.cat([*parts, driver.run([(sequence, 36, 37), (other, 20, 21)])[:1]]).cpu().float()
    torch.testing.assert_close(logits, expected_logits(model, tokens), atol=0.1, rtol=0.1)
    assert set(calls) == {39, 17, 2}
