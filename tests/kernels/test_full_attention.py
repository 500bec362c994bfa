from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels.full_attention import full_attention_cpp, full_attention_reference, full_attention_torch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def make_case(shape, dtype=torch.float32):
    return list(torch.randn(3, *shape, generator=torch.Generator().manual_seed(3)).to(dtype))


@pytest.mark.parametrize("function", [full_attention_torch, full_attention_cpp])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (1, 1, 1, 8), (2, 33, 3, 40), (1, 197, 12, 64), (3, 65, 1, 80)])
def test_equals_the_reference(shape, dtype, function) -> None:
    case = make_case(shape, dtype)
    expected = full_attention_reference(*case, scale=0.3)
    torch.testing.assert_close(function(*case, scale=0.3), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_reference_is_a_softmax_over_all_tokens() -> None:
    q, k, v = make_case((1, 4, 1, 8))
    weights = torch.softmax(0.5 * q[0, :, 0] @ k[0, :, 0].T, dim=-1)
    torch.testing.assert_close(full_attention_reference(q, k, v, scale=0.5)[0, :, 0], weights @ v[0, :, 0])


@pytest.mark.parametrize("function", [full_attention_torch, full_attention_cpp])
def test_strided_inputs(function) -> None:
    case = make_case((2, 6, 3, 16))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case]
    torch.testing.assert_close(function(*strided, scale=0.2), function(*case, scale=0.2))


@pytest.mark.parametrize("function", [full_attention_reference, full_attention_torch, full_attention_cpp])
@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(4, 2, 8), ValueError, "q has shape"),
        (1, torch.zeros(1, 5, 2, 8), ValueError, "k has shape"),
        (2, torch.zeros(1, 4, 2, 8, dtype=torch.float16), TypeError, "v has dtype"),
    ],
)
def test_wrong_arguments_are_named(function, index, value, error, message) -> None:
    case = make_case((1, 4, 2, 8))
    case[index] = value
    with pytest.raises(error, match=message):
        function(*case, scale=1.0)
