from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from dist_vlm.kernels.linear_triton import linear_triton

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (7, 33), (64, 2048), (13, 4100), (5, 11008)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_one_row_is_the_float32_product(device, out_features, in_features, dtype, has_bias) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, in_features, generator=generator).to(dtype)
    weight = (torch.randn(out_features, in_features, generator=generator) / in_features**0.5).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype) if has_bias else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    actual = linear_triton(x.to(device), weight.to(device), None if bias is None else bias.to(device))
    assert actual.dtype == dtype and actual.shape == (1, out_features)
    torch.testing.assert_close(actual.cpu().double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_rows_of_a_greater_matrix(device) -> None:
    wide = torch.randn(6, 20, device=device)
    x = torch.randn(1, 12, device=device)
    torch.testing.assert_close(linear_triton(x, wide[::2, 4:16], None), x @ wide[::2, 4:16].T)


@pytest.mark.parametrize("shape", [(0, 12), (2, 12), (17, 12), (2, 3, 12), (12,), (1, 1, 12)])
def test_other_shapes_are_those_of_torch(device, shape) -> None:
    x, weight, bias = (torch.randn(size, device=device) for size in (shape, (5, 12), (5,)))
    torch.testing.assert_close(linear_triton(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_bias_with_gaps_and_no_outputs(device, num_rows) -> None:
    x, weight = torch.randn(num_rows, 16, device=device).half(), torch.randn(5, 16, device=device).half()
    bias = torch.arange(10, device=device).half()[::2]
    torch.testing.assert_close(linear_triton(x, weight, bias), F.linear(x, weight, bias), atol=1e-2, rtol=1e-2)
    assert linear_triton(x, weight[:0], None).shape == (num_rows, 0)
