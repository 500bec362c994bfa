from __future__ import annotations

import pytest
import torch

from dist_vlm.workers import dummy_source
from dist_vlm.workers.dummy_source import DummySource


def whole(name, shape, *, seed=0):
    target = torch.empty(shape)
    DummySource(seed).copy_into(target, name, shape=shape)
    return target


@pytest.mark.parametrize("chunk", [1, 100, 2**18])
def test_a_slice_holds_the_values_of_the_whole(chunk, monkeypatch) -> None:
    monkeypatch.setitem(dummy_source.CHUNK_VALUES, "cpu", chunk)
    full = whole("model.layers.3.mlp.down_proj.weight", (40, 30))
    target = torch.empty(13, 11)
    index = (slice(20, 33), slice(4, 15))
    DummySource(0).copy_into(target, "model.layers.3.mlp.down_proj.weight", shape=(40, 30), index=index)
    assert torch.equal(target, full[index])


def test_name_and_seed_choose_the_values() -> None:
    assert torch.equal(whole("a.weight", (8, 8)), whole("a.weight", (8, 8)))
    assert not torch.equal(whole("a.weight", (8, 8)), whole("b.weight", (8, 8)))
    assert not torch.equal(whole("a.weight", (8, 8)), whole("a.weight", (8, 8), seed=1))


def test_matrices_are_uniform_without_correlation_and_scaled_by_fan_in() -> None:
    x = whole("q_proj.weight", (500, 400)) * 400**0.5
    assert abs(float(x.mean())) < 0.01
    assert float(x.std()) == pytest.approx(1.0, abs=0.01)
    assert float(x.abs().max()) <= 3**0.5
    counts = torch.histc(x, bins=50, min=-(3**0.5), max=3**0.5)
    chi_square = float(((counts - 4000) ** 2 / 4000).sum())
    assert chi_square < 49 + 5 * (2 * 49) ** 0.5
    rows, columns = (torch.corrcoef(matrix) - torch.eye(len(matrix)) for matrix in (x[:100], x.T[:100]))
    assert float(rows.abs().max()) < 0.3
    assert float(columns.abs().max()) < 0.3


@pytest.mark.parametrize(
    ("name", "shape", "low", "high"),
    [
        ("layers.0.input_layernorm.weight", (64,), 0.9, 1.1),
        ("encoder.layer_norm1.weight", (64,), 0.9, 1.1),
        ("encoder.layer_norm1.bias", (64,), -0.02, 0.02),
        ("self_attn.q_proj.bias", (64,), -0.02, 0.02),
        ("embed_tokens.weight", (64, 8), -1.74, 1.74),
        ("embeddings.patch_embedding.weight", (8, 3, 4, 4), -0.251, 0.251),
    ],
)
def test_ranges(name, shape, low, high) -> None:
    values = whole(name, shape)
    assert low <= float(values.min())
    assert float(values.max()) <= high
    assert float(values.max() - values.min()) > 0.8 * (high - low)


def test_any_tensor_is_there_and_none_is_listed() -> None:
    source = DummySource(0)
    assert source.has("anything")
    assert source.names() == frozenset()
    assert source.unasked("") == []


@pytest.mark.gpu
def test_a_gpu_gets_the_same_values() -> None:
    target = torch.empty(300, 200, device="cuda")
    DummySource(0).copy_into(target, "q_proj.weight", shape=(300, 200))
    assert torch.equal(target.cpu(), whole("q_proj.weight", (300, 200)))
