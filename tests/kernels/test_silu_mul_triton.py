from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels.silu_mul import silu_mul_reference
from dist_vlm.kernels.silu_mul_triton import silu_mul_triton

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("num_tokens", "size"), [(0, 8), (3, 0), (1, 1), (3, 769), (17, 40), (25, 1000), (2, 2048), (2, 2753)]
)
def test_equals_the_reference(num_tokens, size, dtype, device) -> None:
    gate_up = (4 * torch.randn(num_tokens, 2 * size, generator=torch.Generator().manual_seed(1))).to(device, dtype)
    before = gate_up.clone()
    actual, expected = silu_mul_triton(gate_up), silu_mul_reference(gate_up)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(gate_up, before)


# Triton's interpreter cuts float32 off to bfloat16; compiled, it is rounded.
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_is_rounded_once(dtype, device) -> None:
    gate_up = (4 * torch.randn(3, 2000, generator=torch.Generator().manual_seed(2))).to(device, dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    exact = (gate / (1 + (-gate).exp()) * up).to(dtype)
    assert (silu_mul_triton(gate_up) != exact).sum() < 15  # where float32 falls on the other side of a rounding edge


def test_strided_rows(device) -> None:
    wide = torch.randn(6, 20).to(device)
    assert torch.equal(silu_mul_triton(wide[::2, 2:10]), silu_mul_triton(wide[::2, 2:10].contiguous()))
    torch.testing.assert_close(silu_mul_triton(wide[::2, 3:9]), silu_mul_reference(wide[::2, 3:9]))


def test_extreme_gates(device) -> None:
    gates = torch.tensor([-1e30, -200.0, -88.5, -20.0, 0.0, 20.0, 88.5, 200.0, 1e30, torch.inf, torch.nan])
    gate_up = torch.cat((gates, torch.ones(11))).unsqueeze(0).to(device)
    expected = silu_mul_reference(gate_up)
    torch.testing.assert_close(silu_mul_triton(gate_up), expected, equal_nan=True, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("gate_up", "error", "message"),
    [
        (torch.zeros(2, 7), ValueError, "7 columns, must be even"),
        (torch.zeros(2, 3, 4), ValueError, "gate_up has shape"),
        (torch.zeros(4, 6).T, ValueError, "last axis must be dense"),
        (torch.zeros(4, 6, dtype=torch.float64), TypeError, "silu_mul: gate_up has dtype torch.float64, must be one"),
    ],
)
def test_wrong_arguments_are_named(gate_up, error, message, device) -> None:
    with pytest.raises(error, match=message):
        silu_mul_triton(gate_up.to(device))


@pytest.mark.gpu
def test_runs_in_a_graph(device, replay) -> None:
    gate_up = torch.randn(5, 2 * 11008, dtype=torch.bfloat16, device=device)
    actual = replay(lambda: silu_mul_triton(gate_up))
    torch.testing.assert_close(actual, silu_mul_reference(gate_up), atol=2e-2, rtol=2e-2)
