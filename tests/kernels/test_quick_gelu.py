from __future__ import annotations

import pytest
import torch
from transformers.activations import QuickGELUActivation

from dist_vlm.kernels.quick_gelu import quick_gelu_cpp, quick_gelu_reference, quick_gelu_torch

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("function", [quick_gelu_torch, quick_gelu_cpp])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(0, 8), (1,), (3, 769), (2, 197, 64)])
def test_equals_the_reference(shape, dtype, function) -> None:
    x = (4 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    before = x.clone()
    torch.testing.assert_close(function(x), quick_gelu_reference(x), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(x, before)


@pytest.mark.parametrize("function", [quick_gelu_reference, quick_gelu_torch, quick_gelu_cpp])
def test_is_the_activation_of_transformers(function) -> None:
    x = torch.linspace(-9, 9, 301)[::2]
    torch.testing.assert_close(function(x), QuickGELUActivation()(x), atol=1e-6, rtol=1e-6)


def test_extreme_values_of_the_compiled_kernel() -> None:
    x = torch.tensor([-1e30, -200.0, -60.0, 0.0, 60.0, 200.0, 1e30, torch.inf, torch.nan])
    torch.testing.assert_close(quick_gelu_cpp(x), quick_gelu_reference(x), equal_nan=True, rtol=1e-6, atol=1e-8)
