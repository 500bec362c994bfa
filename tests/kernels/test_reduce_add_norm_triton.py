from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels.reduce_add_norm import reduce_add_norm_reference
from dist_vlm.kernels.reduce_add_norm_triton import reduce_add_norm_triton

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
EPS = 1e-5


def identity(tensor):
    return tensor


def make_case(num_tokens, hidden, *, device, dtype=torch.float32, residual=True):
    generator = torch.Generator().manual_seed(hidden)
    partial = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    old = (3 * torch.randn(num_tokens, hidden, generator=generator)).to(dtype) if residual else None
    weight = torch.rand(hidden, generator=generator).add(0.5).to(dtype)
    return [None if tensor is None else tensor.to(device) for tensor in (partial, old, weight)]


def copies(case):
    return [None if tensor is None else tensor.clone() for tensor in case]


def compare(case) -> None:
    expected = reduce_add_norm_reference(*copies(case), eps=EPS, all_reduce=identity)
    normed, total = reduce_add_norm_triton(*case, eps=EPS, all_reduce=identity)
    dtype = normed.dtype
    torch.testing.assert_close(normed, expected[0], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    if dtype == torch.bfloat16 and not normed.is_cuda:
        # Triton's interpreter cuts float32 off to bfloat16; compiled, it is rounded.
        torch.testing.assert_close(total, expected[1], atol=0, rtol=2**-7)
    else:
        assert torch.equal(total, expected[1])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "hidden"), [(0, 16), (1, 1), (3, 769), (2, 5125), (33, 64), (9, 4097), (1, 4096), (2, 16384)]
)
def test_equals_the_reference(num_tokens, hidden, residual, dtype, device) -> None:
    compare(make_case(num_tokens, hidden, dtype=dtype, residual=residual, device=device))


def test_strided_residual_and_weight(device) -> None:
    partial, residual, weight = make_case(5, 24, device=device)
    rows = torch.cat((residual, residual), dim=1)[:, 3:27]
    compare([partial.clone(), rows, weight])
    compare([partial.clone(), residual.T.contiguous().T, weight])
    compare([partial.clone(), residual, torch.stack((weight, weight), dim=1)[:, 0]])
    assert torch.equal(rows[:, :21], residual[:, 3:])  # read where it lies, and left


def test_the_norm_is_rounded_before_the_weight_multiplies_it(device) -> None:
    """Rounded once, the product would have another value in a quarter of the places."""
    partial, _, weight = make_case(4, 2048, dtype=torch.float16, residual=False, device=device)
    normed, _ = reduce_add_norm_triton(partial.clone(), None, weight, eps=EPS, all_reduce=identity)
    exact = partial.double()
    exact *= (exact.square().mean(dim=-1, keepdim=True) + EPS).rsqrt()
    twice = (exact.half().double() * weight.double()).half()
    once = (exact * weight.double()).half()
    assert (once != twice).sum() > 1000
    assert (normed != twice).sum() < 40  # where float32 falls on the other side of a rounding edge


def test_the_sum_over_ranks_goes_through_the_callable_once(device) -> None:
    partial, residual, weight = make_case(4, 12, device=device)
    calls = []

    def triple(tensor):
        calls.append(tuple(tensor.shape))
        return tensor.mul_(3)

    _, total = reduce_add_norm_triton(partial.clone(), residual.clone(), weight, eps=EPS, all_reduce=triple)
    torch.testing.assert_close(total, residual + 3 * partial)
    assert calls == [(4, 12)]


def test_a_row_does_not_depend_on_its_batch(device) -> None:
    case = make_case(7, 1000, dtype=torch.bfloat16, device=device)
    together, _ = reduce_add_norm_triton(*copies(case), eps=EPS, all_reduce=identity)
    for row in range(7):
        one = [case[0][row : row + 1].clone(), case[1][row : row + 1].clone(), case[2]]
        alone, _ = reduce_add_norm_triton(*one, eps=EPS, all_reduce=identity)
        assert torch.equal(together[row], alone[0])


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
def test_wrong_arguments_are_named(index, value, error, message, device) -> None:
    case = make_case(4, 12, device=device)
    case[index] = value.to(device)
    with pytest.raises(error, match=message):
        reduce_add_norm_triton(*case, eps=EPS, all_reduce=identity)


def test_a_dtype_it_would_compute_too_coarsely_is_refused(device) -> None:
    case = make_case(2, 8, dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match=r"reduce_add_norm: partial has dtype torch.float64, must be one of"):
        reduce_add_norm_triton(*case, eps=EPS, all_reduce=identity)


@pytest.mark.gpu
def test_runs_in_a_graph(device, replay) -> None:
    partial, residual, weight = make_case(5, 4096, dtype=torch.bfloat16, device=device)
    expected, _ = reduce_add_norm_reference(partial.clone(), residual.clone(), weight, eps=EPS, all_reduce=identity)
    static = partial.clone()
    normed, _ = replay(
        lambda: reduce_add_norm_triton(
            static, residual, weight, eps=EPS, all_reduce=lambda tensor: tensor.copy_(partial)
        )
    )
    torch.testing.assert_close(normed, expected, atol=2e-2, rtol=2e-2)
