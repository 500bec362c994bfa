from __future__ import annotations

import pytest
import torch
from transformers.activations import QuickGELUActivation

from dist_vlm.kernels.quick_gelu import quick_gelu_reference
from dist_vlm.kernels.quick_gelu_triton import quick_gelu_triton

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(0, 8), (1,), (3, 769), (2, 197, 64), (4, 1024)])
def test_equals_the_reference(shape, dtype, device) -> None:
    x = (4 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(device, dtype)
    before = x.clone()
    torch.testing.assert_close(
        quick_gelu_triton(x), quick_gelu_reference(x), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )
    assert torch.equal(x, before)


def test_is_the_activation_of_transformers(device) -> None:
    x = torch.linspace(-9, 9, 301, device=device)[::2]
    torch.testing.assert_close(quick_gelu_triton(x), QuickGELUActivation()(x), atol=1e-6, rtol=1e-6)


def test_any_strides(device) -> None:
    x = torch.randn(6, 5, 4).to(device)
    for view in (x.transpose(0, 2), x[:, 1:4, ::2], x[:1].expand(3, 5, 4)):
        torch.testing.assert_close(quick_gelu_triton(view), quick_gelu_reference(view), atol=1e-6, rtol=1e-6)


def test_extreme_values(device) -> None:
    x = torch.tensor([-1e30, -200.0, -60.0, 0.0, 60.0, 200.0, 1e30, torch.inf, torch.nan]).to(device)
    torch.testing.assert_close(quick_gelu_triton(x), quick_gelu_reference(x), equal_nan=True, rtol=1e-6, atol=1e-8)


def test_a_dtype_it_would_compute_too_coarsely_is_refused(device) -> None:
    with pytest.raises(TypeError, match=r"quick_gelu: x has dtype torch.float64, must be one of"):
        quick_gelu_triton(torch.zeros(3, dtype=torch.float64, device=device))


@pytest.mark.gpu
def test_runs_in_a_graph(device, replay) -> None:
    x = torch.randn(2, 577, 4096, dtype=torch.bfloat16, device=device)
    actual = replay(lambda: quick_gelu_triton(x))
    torch.testing.assert_close(actual, quick_gelu_reference(x), atol=2e-2, rtol=2e-2)
