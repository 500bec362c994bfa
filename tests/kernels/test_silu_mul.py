from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels.silu_mul import silu_mul_cpp, silu_mul_reference, silu_mul_torch

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("function", [silu_mul_torch, silu_mul_cpp])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_tokens", "size"), [(0, 8), (1, 1), (3, 769), (17, 40), (25, 1000)])
def test_equals_the_reference(num_tokens, size, dtype, function) -> None:
    gate_up = (4 * torch.randn(num_tokens, 2 * size, generator=torch.Generator().manual_seed(1))).to(dtype)
    before = gate_up.clone()
    actual, expected = function(gate_up), silu_mul_reference(gate_up)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(gate_up, before)


def test_reference_at_known_points() -> None:
    out = silu_mul_reference(torch.tensor([[0.0, 1.0, 5.0, 2.0]]))
    torch.testing.assert_close(out, torch.tensor([[0.0, 2.0 / (1.0 + 2.718281828**-1)]]))


@pytest.mark.parametrize("function", [silu_mul_torch, silu_mul_cpp])
def test_strided_rows(function) -> None:
    wide = torch.randn(6, 20)
    assert torch.equal(function(wide[::2, 2:10]), function(wide[::2, 2:10].contiguous()))


def test_extreme_gates_of_the_compiled_kernel() -> None:
    gates = torch.tensor([-1e30, -200.0, -88.5, -20.0, 0.0, 20.0, 88.5, 200.0, 1e30, torch.inf, torch.nan])
    gate_up = torch.cat((gates, torch.ones(11))).unsqueeze(0)
    torch.testing.assert_close(silu_mul_cpp(gate_up), silu_mul_reference(gate_up), equal_nan=True, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("function", [silu_mul_reference, silu_mul_torch, silu_mul_cpp])
@pytest.mark.parametrize(
    ("gate_up", "message"),
    [
        (torch.zeros(2, 7), "7 columns, must be even"),
        (torch.zeros(2, 3, 4), "gate_up has shape"),
        (torch.zeros(4, 6).T, "last axis must be dense"),
    ],
)
def test_wrong_arguments_are_named(function, gate_up, message) -> None:
    with pytest.raises(ValueError, match=message):
        function(gate_up)
