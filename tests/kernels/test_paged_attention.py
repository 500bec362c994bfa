"""The batched implementations against the float32 reference, and the reference against a plain softmax."""

from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels import paged_attention as op
from dist_vlm.kernels.paged_attention import (
    paged_attention_cpp,
    paged_attention_reference,
    paged_attention_torch,
    plan_attention_cpp,
    plan_attention_reference,
    plan_attention_torch,
)

from .attention_cases import BATCHES, TOLERANCE, make_case, run

BATCHED = ((plan_attention_torch, paged_attention_torch), (plan_attention_cpp, paged_attention_cpp))


def compare(sequences, *, block_size=8, **options) -> None:
    case = make_case(sequences, block_size=block_size, **options)
    expected = run(plan_attention_reference, paged_attention_reference, case, block_size=block_size)
    tolerance = TOLERANCE[case[0].dtype]
    for functions in BATCHED:
        actual = run(*functions, case, block_size=block_size)
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("sequences", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_equals_the_reference(sequences, block_size) -> None:
    compare(sequences, block_size=block_size)


@pytest.mark.parametrize("head_dim", [24, 40, 64, 80, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (5, 1)])
def test_odd_head_shapes(head_dim, heads, kv_heads) -> None:
    compare(BATCHES["mixed"], head_dim=head_dim, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype) -> None:
    compare(BATCHES["mixed"], dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 128), (6, 2, 64), (5, 1, 40), (3, 3, 256)])
def test_equals_the_reference_on_a_gpu(dtype, heads, kv_heads, head_dim) -> None:
    q, *caches, batch = make_case(
        BATCHES["mixed"], heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, stale=float("nan")
    )
    expected = run(plan_attention_reference, paged_attention_reference, (q, *caches, batch), block_size=8)
    case = (q.cuda(), *(cache.cuda() for cache in caches), [tensor.cuda() for tensor in batch])
    actual = run(plan_attention_torch, paged_attention_torch, case, block_size=8)
    tolerance = max(TOLERANCE[dtype], 2e-5)
    torch.testing.assert_close(actual.cpu(), expected, atol=tolerance, rtol=tolerance)


def test_reference_is_a_causal_softmax() -> None:
    q, keys, values, batch = make_case([(6, 6)], heads=2, kv_heads=2, block_size=8)
    out = run(plan_attention_reference, paged_attention_reference, (q, keys, values, batch), block_size=8)
    block = int(batch[2][0, 0])
    scores = torch.einsum("qhd,khd->hqk", q, keys[block, :6]) * 0.2
    scores = scores.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(out, torch.einsum("hqk,khd->qhd", scores.softmax(-1), values[block, :6]))


def test_an_empty_batch_gives_an_empty_result() -> None:
    q, keys, values, _ = make_case([(2, 2)])
    batch = (torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64))
    for plan_function, function in (
        (plan_attention_reference, paged_attention_reference),
        *BATCHED,
    ):
        assert run(plan_function, function, (q[:0], keys, values, batch), block_size=8).shape == (0, 4, 32)


@pytest.mark.parametrize("functions", BATCHED)
def test_strided_queries(functions) -> None:
    q, keys, values, batch = make_case(BATCHES["mixed"])
    fused = torch.randn(q.shape[0], 9, q.shape[2])
    fused[:, 2:6] = q
    out = run(*functions, (fused[:, 2:6], keys, values, batch), block_size=8)
    expected = run(*functions, (q, keys, values, batch), block_size=8)
    assert torch.equal(out, expected)


def test_what_lies_past_a_context_is_never_used() -> None:
    """Stale NaN of another request in a shared cache must not reach this one."""
    compare(BATCHES["mixed"], stale=float("nan"))
    compare(BATCHES["decode"], stale=float("nan"), block_size=16)


def test_large_decode_batches_are_cut_to_the_budget(monkeypatch) -> None:
    monkeypatch.setattr(op, "GATHER_BYTES", 64 * 40)
    case = make_case([(1, 9), (1, 30), (1, 8), (1, 16), (1, 50)])
    plan = plan_attention_torch(*case[3], block_size=8, position_bytes=64)
    assert [part.tokens.tolist() for part in plan.decodes] == [[2, 0], [3], [1], [4]]
    compare([(1, 9), (1, 30), (1, 8), (1, 16), (1, 50)])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(3, 4, 32)}, ValueError, "q has shape"),
        ({"q": torch.zeros(2, 3, 32)}, ValueError, "3 heads are not a multiple of 2"),
        ({"q": torch.zeros(2, 4, 16)}, ValueError, "key_cache has shape"),
        ({"q": torch.zeros(2, 32, 4).transpose(1, 2)}, ValueError, "last axis must be dense"),
        ({"keys": torch.zeros(4, 8, 2, 32, dtype=torch.bfloat16)}, TypeError, "key_cache has dtype"),
        ({"values": torch.zeros(5, 8, 2, 32)}, ValueError, "value_cache has shape"),
    ],
)
@pytest.mark.parametrize("implementation", ["reference", "torch", "cpp"])
def test_wrong_arguments_are_named(change, error, message, implementation) -> None:
    arguments = {"q": torch.zeros(2, 4, 32), "keys": torch.zeros(4, 8, 2, 32), "values": torch.zeros(4, 8, 2, 32)}
    arguments |= change
    batch = (torch.tensor([0, 2]), torch.tensor([2]), torch.tensor([[1]]))
    plan = getattr(op, f"plan_attention_{implementation}")(*batch, block_size=8, position_bytes=64)
    function = getattr(op, f"paged_attention_{implementation}")
    with pytest.raises(error, match=message):
        function(arguments["q"], arguments["keys"], arguments["values"], plan, scale=1.0)


@pytest.mark.parametrize("functions", BATCHED)
@pytest.mark.parametrize("block", [-1, 7])
def test_a_block_outside_the_cache_is_an_error(functions, block) -> None:
    q, keys, values, (starts, contexts, tables) = make_case([(1, 9), (1, 20)])
    keys, values, tables[1, 2] = keys[:7], values[:7], block
    tables[tables > 7] = 0
    with pytest.raises(IndexError):
        run(*functions, (q, keys, values, (starts, contexts, tables)), block_size=8)


def test_a_long_batch_is_shared_out_over_threads() -> None:
    compare([(1, 700), (1, 3), (1, 1500), (1, 64)], heads=8, kv_heads=2, head_dim=64, block_size=16)


@pytest.mark.parametrize(
    ("starts", "contexts", "message"),
    [([0, 3], [2], "sequence 0 has tokens"), ([0, 2], [9], "sequence 0 has tokens"), ([0, 2, 1], [2, 2], "sequence 1")],
)
@pytest.mark.parametrize("plan_function", [plan_attention_torch, plan_attention_cpp])
def test_contradicting_bounds_are_refused(starts, contexts, message, plan_function) -> None:
    tables = torch.ones(len(contexts), 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        plan_function(torch.tensor(starts), torch.tensor(contexts), tables, block_size=8, position_bytes=64)
