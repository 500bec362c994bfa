"""Shards of a layer against the whole layer in torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_vlm.workers.dummy_source import DummySource
from dist_vlm.workers.layers import (
    ColumnParallelLinear,
    NormWeight,
    ParallelHead,
    Placement,
    RowParallelLinear,
    Section,
    VocabParallelEmbedding,
    even_section,
    kv_head_section,
    load_layers,
    vocab_section,
)

from .thread_comm import on_ranks, thread_comms

CPU = torch.device("cpu")
WORLDS = [1, 2, 3, 4]


def whole(name, *shape):
    target = torch.empty(shape)
    DummySource(0).copy_into(target, name, shape=shape)
    return target


def on_world(world_size, build, names, x):
    """Builds the layer on every rank, fills it with the dummy tensors `names` and calls it with x(rank, layer)."""
    comms = thread_comms(world_size)

    def work(rank):
        layer = build(Placement(comms[rank], torch.float32, CPU))
        layer.load(DummySource(0), names)
        return layer(x(layer))

    return on_ranks(comms, work)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("bias", [False, True])
def test_fused_columns_are_the_ranks_rows_of_each_matrix(world_size, bias) -> None:
    x = torch.randn(5, 10)

    def build(place):
        sections = (even_section("a", 12, comm=place.comm), even_section("b", 24, comm=place.comm))
        return ColumnParallelLinear(10, sections, bias=bias, place=place)

    parts = on_world(world_size, build, ("a", "b"), lambda _: x)
    for name, size, start in (("a", 12, 0), ("b", 24, 12 // world_size)):
        got = torch.cat([part[:, start : start + size // world_size] for part in parts], dim=1)
        expected = x @ whole(f"{name}.weight", size, 10).T
        torch.testing.assert_close(got, expected + whole(f"{name}.bias", size) if bias else expected)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("bias", [False, True])
def test_partial_sums_of_rows_add_up(world_size, bias) -> None:
    x = torch.randn(5, 24)

    def build(place):
        return RowParallelLinear(even_section("in", 24, comm=place.comm), 7, bias=bias, place=place)

    parts = on_world(world_size, build, ("o",), lambda layer: x[:, layer.section.start : layer.section.stop])
    expected = x @ whole("o.weight", 7, 24).T
    torch.testing.assert_close(sum(parts), expected + whole("o.bias", 7) if bias else expected)


def test_only_rank_0_holds_the_bias_of_a_row_parallel_linear() -> None:
    layers = [
        RowParallelLinear(Section(8, 0, 4), 3, bias=True, place=Placement(comm, torch.float32, CPU))
        for comm in thread_comms(2)
    ]
    assert [layer.bias is not None for layer in layers] == [True, False]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("vocab_size", [24, 25, 7, 3])
def test_embedding_rows_add_up_and_the_head_gathers_them(world_size, vocab_size) -> None:
    ids = torch.arange(vocab_size).flip(0)
    weight = whole("e.weight", vocab_size, 6)

    def embedding(place):
        return VocabParallelEmbedding(vocab_section(vocab_size, comm=place.comm), 6, place=place)

    parts = on_world(world_size, embedding, ("e",), lambda _: ids)
    assert torch.equal(sum(parts), weight[ids])

    def head(place):
        return ParallelHead(vocab_section(vocab_size, comm=place.comm), 6, tied=None, place=place)

    x = torch.randn(4, 6)
    for logits in on_world(world_size, head, ("e",), lambda _: x):
        torch.testing.assert_close(logits, x @ weight.T)


@pytest.mark.parametrize("world_size", WORLDS)
def test_features_given_to_one_rank_are_in_the_sum_once(world_size) -> None:
    ids, rows, features = torch.tensor([3, 8, 0, 8]), torch.tensor([-1, 1, -1, 0]), torch.randn(2, 6)
    comms = thread_comms(world_size)

    def work(rank):
        place = Placement(comms[rank], torch.float32, CPU)
        layer = VocabParallelEmbedding(vocab_section(9, comm=place.comm), 6, place=place)
        layer.load(DummySource(0), ("e",))
        return layer(ids, rows, features if rank == 0 else None)

    weight = whole("e.weight", 9, 6)
    assert torch.equal(sum(on_ranks(comms, work)), torch.stack((weight[3], features[1], weight[0], features[0])))


def test_logits_are_float32_whatever_the_weights() -> None:
    place = Placement(thread_comms(1)[0], torch.bfloat16, CPU)
    head = ParallelHead(vocab_section(9, comm=place.comm), 4, tied=None, place=place)
    head.load(DummySource(0), ("h",))
    assert head(torch.randn(2, 4).bfloat16()).dtype == torch.float32


def test_a_tied_head_has_no_weight_of_its_own() -> None:
    place = Placement(thread_comms(1)[0], torch.float32, CPU)
    section = vocab_section(9, comm=place.comm)
    embedding = VocabParallelEmbedding(section, 4, place=place)
    assert ParallelHead(section, 4, tied=embedding, place=place).weight is embedding.weight


@pytest.mark.parametrize(
    ("num_kv_heads", "world_size", "expected"),
    [(4, 2, [(0, 16), (16, 32)]), (2, 4, [(0, 8), (0, 8), (8, 16), (8, 16)]), (1, 3, [(0, 8)] * 3)],
)
def test_kv_heads_are_split_or_replicated(num_kv_heads, world_size, expected) -> None:
    sections = [kv_head_section(num_kv_heads, 8, comm=comm) for comm in thread_comms(world_size)]
    assert [(section.start, section.stop) for section in sections] == expected


@pytest.mark.parametrize(
    ("num_kv_heads", "world_size", "message"),
    [
        (4, 3, "num_key_value_heads is 4: not divisible by world_size 3"),
        (2, 3, "num_key_value_heads is 2: does not divide world_size 3"),
    ],
)
def test_kv_heads_that_come_out_uneven_are_refused(num_kv_heads, world_size, message) -> None:
    with pytest.raises(ValueError, match=message):
        kv_head_section(num_kv_heads, 8, comm=thread_comms(world_size)[0])


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        place = Placement(thread_comms(1)[0], torch.float32, CPU)
        self.first, self.second = NormWeight(3, place=place), NormWeight(3, place=place)


def test_the_table_fills_every_layer() -> None:
    pair = Pair()
    load_layers(pair, {"first": ("a_norm",), "second": ("b_norm",)}, DummySource(0))
    assert torch.equal(pair.first.weight, whole("a_norm.weight", 3))
    assert torch.equal(pair.second.weight, whole("b_norm.weight", 3))


def test_a_table_that_leaves_a_layer_out_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="leaves out: second"):
        load_layers(Pair(), {"first": ("a_norm",)}, DummySource(0))
