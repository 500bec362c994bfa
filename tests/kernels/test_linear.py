from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels.linear import can_pack, linear, pack

SHAPES = [(1, 40, 24), (3, 769, 33), (17, 64, 4096), (300, 96, 160), (0, 32, 16)]


def make_case(rows, size, columns):
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, size, generator=generator), torch.randn(columns, size, generator=generator)
    return x.bfloat16(), (weight / size**0.5).bfloat16(), torch.randn(columns, generator=generator).bfloat16()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_weight_gives_the_product(shape, has_bias) -> None:
    x, weight, bias = make_case(*shape)
    if not can_pack(weight):
        pytest.skip("this processor has no packed form")
    bias = bias if has_bias else None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    actual = linear(x, pack(weight), bias)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), exact, atol=2e-2, rtol=1e-2)


def test_leading_axes_are_kept() -> None:
    x, weight, bias = make_case(12, 64, 48)
    if not can_pack(weight):
        pytest.skip("this processor has no packed form")
    stacked = linear(x.view(2, 6, 64), pack(weight), bias)
    assert torch.equal(stacked.view(12, 48), linear(x, pack(weight), bias))


@pytest.mark.parametrize("weight", [torch.zeros(4, 8), torch.zeros(4, 8).half(), torch.zeros(0, 8).bfloat16()])
def test_other_weights_stay_as_they_are(weight) -> None:
    assert not can_pack(weight)
    assert linear(torch.zeros(2, 8, dtype=weight.dtype), weight, None).shape == (2, weight.shape[0])
