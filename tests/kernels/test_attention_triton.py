"""Rotary embedding, cache and attention of single tokens in one kernel, against the three in float32 one by one."""

from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels import attention_triton as attention_triton_module
from dist_vlm.kernels import paged_decode_triton
from dist_vlm.kernels.attention_triton import attention_triton
from dist_vlm.kernels.choice import IMPLEMENTATIONS
from dist_vlm.kernels.paged_attention import plan_attention_reference
from dist_vlm.kernels.paged_decode_triton import num_parts
from dist_vlm.kernels.paged_plan_triton import plan_decode_triton

from .attention_cases import TOLERANCE, make_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter reads the bits of a bfloat16 matrix as integers where it multiplies.
DTYPES = [pytest.param(dtype, marks=pytest.mark.gpu) if dtype == torch.bfloat16 else dtype for dtype in TOLERANCE]
BLOCK_SIZE = 8
SCALE = 0.2


class Case:
    """Sequences of one new token each, whose keys and values the cache does not have yet: their places hold NaN."""

    def __init__(self, contexts, *, heads=4, kv_heads=2, head_dim=32, rotated=None, dtype=torch.float32) -> None:
        sequences = [(1, context) for context in contexts]
        _, self.keys, self.values, (self.starts, self.contexts, self.tables) = make_case(
            sequences, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, stale=float("nan")
        )
        count, rotated = len(contexts), head_dim if rotated is None else rotated
        generator = torch.Generator().manual_seed(count)
        qkv = torch.randn(count, heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
        self.q, self.k, self.v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        angles = 6 * torch.rand(count, rotated // 2, generator=generator).repeat(1, 2)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        last = self.contexts - 1
        self.slots = self.tables[torch.arange(count), last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE
        for cache in (self.keys, self.values):
            cache.view(-1, kv_heads, head_dim)[self.slots] = float("nan")
        self.tolerance = max(TOLERANCE[dtype], 2e-5)

    def expected(self):
        """(output, keys, values) of the reference."""
        caches = self.keys.clone(), self.values.clone()
        plan = plan_attention_reference(
            self.starts, self.contexts, self.tables, block_size=BLOCK_SIZE, position_bytes=64
        )
        new = (self.q, self.k, self.v, self.cos, self.sin, *caches, self.slots)
        return IMPLEMENTATIONS["reference"].attention(*new, plan, scale=SCALE), *caches

    def actual(self, *, order=None, idle=(), unwritten=None, spread=False):
        """order: the slot of each row. idle: rows that are computed for nothing. unwritten: the place in the
        cache that rows are given instead of theirs. spread: whether numbers of a head lie apart.
        """
        order = torch.arange(len(self.contexts)) if order is None else order
        tables = torch.empty_like(self.tables).index_copy_(0, order, self.tables).to(torch.int32)
        contexts, slots = self.contexts.clone(), self.slots.clone()
        contexts[list(idle)], slots[list(idle)] = 0, -1
        for row, slot in (unwritten or {}).items():
            slots[row] = slot
        caches = self.keys.to(DEVICE), self.values.to(DEVICE)
        new = [x.to(DEVICE) for x in (self.q, self.k, self.v, self.cos, self.sin)]
        if spread:
            new = [torch.stack([x, torch.full_like(x, 9.0)], dim=-1)[..., 0] for x in new]
        plan = plan_decode_triton(order.to(DEVICE), contexts.to(DEVICE), tables.to(DEVICE), block_size=BLOCK_SIZE)
        out = attention_triton(*new, *caches, slots.to(DEVICE), plan, scale=SCALE)
        return out.cpu(), *(cache.cpu() for cache in caches)


def assert_same(case, actual, expected) -> None:
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=case.tolerance, rtol=case.tolerance, equal_nan=True)


@pytest.fixture(autouse=True)
def _one_kernel(monkeypatch) -> None:
    """The way of two kernels cannot be taken."""
    monkeypatch.setattr(attention_triton_module, "_two_kernels", None)


@pytest.mark.parametrize("contexts", [[1], [9, 30, 8, 16, 17], [1, 2, 700]], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_equals_the_reference(contexts, heads, kv_heads) -> None:
    case = Case(contexts, heads=heads, kv_heads=kv_heads)
    assert_same(case, case.actual(), case.expected())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotated"), [(2, 2, 80, 32), (4, 2, 24, 24), (2, 1, 128, 64)]
)
def test_heads_of_any_size_of_which_a_part_is_rotated(heads, kv_heads, head_dim, rotated, dtype) -> None:
    case = Case([5, 67, 128], heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotated=rotated, dtype=dtype)
    assert_same(case, case.actual(), case.expected())


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_many_sequences_which_are_not_cut_into_parts(kv_heads, monkeypatch) -> None:
    monkeypatch.setattr(paged_decode_triton, "_WANTED_PROGRAMS", 64)
    count = 36 // kv_heads
    assert num_parts(count * kv_heads) == 1
    case = Case([7 * index % 60 + 1 for index in range(count)], kv_heads=kv_heads, head_dim=16)
    assert_same(case, case.actual(), case.expected())


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_slots_in_any_order_and_rows_for_nothing(kv_heads) -> None:
    case = Case([12, 40, 3, 25], kv_heads=kv_heads)
    out, *caches = case.actual(order=torch.tensor([2, 0, 3, 1]), idle=[1])
    expected, *written = case.expected()
    expected[1] = 0
    for cache, before, wanted in zip(caches, (case.keys, case.values), written, strict=True):
        wanted.flatten(0, 1)[case.slots[1]] = before.flatten(0, 1)[case.slots[1]]
        torch.testing.assert_close(cache, wanted, atol=case.tolerance, rtol=case.tolerance, equal_nan=True)
    torch.testing.assert_close(out, expected, atol=case.tolerance, rtol=case.tolerance)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_token_without_a_place_in_the_cache_is_attended_to_and_not_written(kv_heads) -> None:
    case = Case([12, 40, 3], kv_heads=kv_heads)
    out, *caches = case.actual(unwritten={0: -1, 2: case.keys.shape[0] * BLOCK_SIZE})
    expected, *written = case.expected()
    for cache, before, wanted in zip(caches, (case.keys, case.values), written, strict=True):
        for row in (0, 2):
            wanted.flatten(0, 1)[case.slots[row]] = before.flatten(0, 1)[case.slots[row]]
        torch.testing.assert_close(cache, wanted, atol=case.tolerance, rtol=case.tolerance, equal_nan=True)
    torch.testing.assert_close(out, expected, atol=case.tolerance, rtol=case.tolerance)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_numbers_that_lie_apart(kv_heads) -> None:
    case = Case([12, 40, 3], kv_heads=kv_heads)
    assert_same(case, case.actual(spread=True), case.actual())
