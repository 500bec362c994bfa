"""The Triton kernels against the float32 reference; without a GPU, through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels import paged_decode_triton, paged_prefill_triton
from dist_vlm.kernels.paged_attention import paged_attention_reference, plan_attention_reference
from dist_vlm.kernels.paged_attention_triton import paged_attention_triton
from dist_vlm.kernels.paged_decode_triton import num_parts
from dist_vlm.kernels.paged_plan_triton import plan_attention_triton, plan_decode_triton

from .attention_cases import BATCHES, TOLERANCE, make_case, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter reads the bits of a bfloat16 matrix as integers where it multiplies.
DTYPES = [pytest.param(dtype, marks=pytest.mark.gpu) if dtype == torch.bfloat16 else dtype for dtype in TOLERANCE]
SHAPES = [(4, 4, 128), (6, 2, 64), (5, 1, 40), (3, 3, 24), (2, 1, 256), (2, 2, 80)]


def compare(sequences, *, block_size=8, **options) -> None:
    q, *caches, batch = make_case(sequences, block_size=block_size, stale=float("nan"), **options)
    expected = run(plan_attention_reference, paged_attention_reference, (q, *caches, batch), block_size=block_size)
    case = (q.to(DEVICE), *(cache.to(DEVICE) for cache in caches), [tensor.to(DEVICE) for tensor in batch])
    actual = run(plan_attention_triton, paged_attention_triton, case, block_size=block_size)
    tolerance = max(TOLERANCE[q.dtype], 2e-5)
    torch.testing.assert_close(actual.cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("sequences", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_equals_the_reference(sequences, block_size) -> None:
    compare(sequences, block_size=block_size)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_shapes_and_dtypes(heads, kv_heads, head_dim, dtype) -> None:
    compare(BATCHES["mixed"], heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("few_programs", [528, 0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sequences", [[(150, 150)], [(130, 205)], [(70, 70), (1, 133), (129, 257)]])
def test_several_tiles(sequences, dtype, few_programs, monkeypatch) -> None:
    """As of a short step and of a long one."""
    monkeypatch.setattr(paged_prefill_triton, "_FEW_PROGRAMS", few_programs)
    compare(sequences, heads=2, kv_heads=1, head_dim=16, dtype=dtype)


def test_positions_in_parts(monkeypatch) -> None:
    """Contexts shorter and longer than the parts, and parts without a position."""
    monkeypatch.setattr(paged_decode_triton, "_WANTED_PROGRAMS", 1056)
    assert num_parts(4) == 16
    compare([(1, 700), (1, 1), (1, 65)], heads=2, kv_heads=1, head_dim=32)
    compare([(1, 2050), (1, 47), (1, 48), (1, 49), (1, 96)], heads=2, kv_heads=2, head_dim=16)
    compare([(1, 129), (1, 200)], heads=2, kv_heads=2, head_dim=32, dtype=torch.bfloat16)


@pytest.mark.parametrize("num_seqs", [3, 40])
def test_a_batch_of_slots(num_seqs) -> None:
    """Rows of slots in any order; a context of 0 gives zeros."""
    contexts = [7 * index % 60 + 1 for index in range(num_seqs)]
    q, keys, values, batch = make_case([(1, context) for context in contexts], heads=8, kv_heads=8, head_dim=16)
    expected = run(plan_attention_reference, paged_attention_reference, (q, keys, values, batch), block_size=8)
    order = torch.randperm(num_seqs, generator=torch.Generator().manual_seed(1))
    tables = torch.empty_like(batch[2]).index_copy_(0, order, batch[2]).to(torch.int32)
    idle = torch.tensor(contexts)
    idle[1] = 0
    expected[1] = 0
    plan = plan_decode_triton(order.to(DEVICE), idle.to(DEVICE), tables.to(DEVICE), block_size=8)
    actual = paged_attention_triton(q.to(DEVICE), keys.to(DEVICE), values.to(DEVICE), plan, scale=0.2)
    torch.testing.assert_close(actual.cpu(), expected, atol=2e-5, rtol=2e-5)


def test_strided_queries() -> None:
    q, keys, values, batch = make_case(BATCHES["mixed"], heads=6)
    wide = torch.randn(q.shape[0], 2 * q.shape[1], q.shape[2])
    wide[:, ::2] = q
    batch, (keys, values) = [tensor.to(DEVICE) for tensor in batch], (keys.to(DEVICE), values.to(DEVICE))
    strided = run(
        plan_attention_triton, paged_attention_triton, (wide.to(DEVICE)[:, ::2], keys, values, batch), block_size=8
    )
    dense = run(plan_attention_triton, paged_attention_triton, (q.to(DEVICE), keys, values, batch), block_size=8)
    assert torch.equal(strided, dense)


def test_known_bounds_give_the_same_and_wrong_ones_are_named() -> None:
    q, keys, values, batch = make_case(BATCHES["mixed"])
    starts, contexts, tables = batch
    bounds = list(zip(starts[:-1].tolist(), starts[1:].tolist(), contexts.tolist(), strict=True))
    read = plan_attention_triton(*batch, block_size=8, position_bytes=64)
    told = plan_attention_triton(*batch, block_size=8, position_bytes=64, bounds=bounds)
    assert torch.equal(read.tiles, told.tiles) and torch.equal(read.decodes.contexts, told.decodes.contexts)
    with pytest.raises(ValueError, match="sequence 0 has tokens"):
        plan_attention_triton(starts, torch.zeros_like(contexts), tables, block_size=8, position_bytes=64)


def test_an_empty_batch_gives_an_empty_result() -> None:
    q, keys, values, _ = make_case([(2, 2)])
    batch = (torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64))
    assert run(plan_attention_triton, paged_attention_triton, (q[:0], keys, values, batch), block_size=8).shape[0] == 0
