from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dist_vlm.kernels.reduce_add_norm import (
    reduce_add_norm_cpp,
    reduce_add_norm_reference,
    reduce_add_norm_torch,
)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
EPS = 1e-5


def identity(tensor):
    return tensor


def make_case(num_tokens, hidden, *, dtype=torch.float32, residual=True):
    generator = torch.Generator().manual_seed(hidden)
    partial = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    old = (3 * torch.randn(num_tokens, hidden, generator=generator)).to(dtype) if residual else None
    weight = torch.rand(hidden, generator=generator).add(0.5).to(dtype)
    return partial, old, weight


def copies(case):
    return [None if tensor is None else tensor.clone() for tensor in case]


@pytest.mark.parametrize("function", [reduce_add_norm_torch, reduce_add_norm_cpp])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("num_tokens", "hidden"), [(0, 16), (1, 1), (3, 769), (2, 5125), (33, 64), (9, 4097)])
def test_equals_the_reference(num_tokens, hidden, residual, dtype, function) -> None:
    case = make_case(num_tokens, hidden, dtype=dtype, residual=residual)
    expected = reduce_add_norm_reference(*copies(case), eps=EPS, all_reduce=identity)
    actual = function(*copies(case), eps=EPS, all_reduce=identity)
    torch.testing.assert_close(actual[0], expected[0], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rounds_as_the_module_of_transformers(dtype) -> None:
    partial, residual, weight = make_case(9, 321, dtype=dtype)
    norm = LlamaRMSNorm(321, eps=EPS).to(dtype)
    norm.weight.data.copy_(weight)
    summed = residual + partial
    with torch.no_grad():
        expected = norm(summed)
    actual, total = reduce_add_norm_torch(partial, residual, weight, eps=EPS, all_reduce=identity)
    assert torch.equal(total, summed)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("function", [reduce_add_norm_reference, reduce_add_norm_torch, reduce_add_norm_cpp])
def test_the_sum_over_ranks_goes_through_the_callable_once(function) -> None:
    partial, residual, weight = make_case(4, 12)
    calls = []

    def triple(tensor):
        calls.append(tuple(tensor.shape))
        return tensor.mul_(3)

    _, total = function(partial.clone(), residual.clone(), weight, eps=EPS, all_reduce=triple)
    torch.testing.assert_close(total, residual + 3 * partial)
    assert calls == [(4, 12)]


@pytest.mark.parametrize("function", [reduce_add_norm_reference, reduce_add_norm_torch, reduce_add_norm_cpp])
@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(4, 13), ValueError, "partial has shape"),
        (0, torch.zeros(12, 4).T, ValueError, "partial has strides"),
        (1, torch.zeros(3, 12), ValueError, "residual has shape"),
        (1, torch.zeros(4, 12, dtype=torch.float16), TypeError, "residual has dtype"),
        (2, torch.zeros(12, dtype=torch.bfloat16), TypeError, "weight has dtype"),
    ],
)
def test_wrong_arguments_are_named(function, index, value, error, message) -> None:
    case = list(make_case(4, 12))
    case[index] = value
    with pytest.raises(error, match=message):
        function(*case, eps=EPS, all_reduce=identity)
