from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels.rotary import apply_rotary_cpp, apply_rotary_reference, apply_rotary_torch

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def make_case(num_tokens, *, heads=3, kv_heads=1, head_dim=24, rotary_dim=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_tokens)
    q = torch.randn(num_tokens, heads, head_dim, generator=generator).to(dtype)
    k = torch.randn(num_tokens, kv_heads, head_dim, generator=generator).to(dtype)
    angles = torch.rand(num_tokens, rotary_dim or head_dim, generator=generator) * 6
    return q, k, angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("function", [apply_rotary_torch, apply_rotary_cpp])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("num_tokens", "head_dim", "rotary_dim"), [(0, 24, 24), (1, 2, 2), (7, 256, 256), (5, 40, 12), (90, 64, 64)]
)
def test_equals_the_reference(num_tokens, head_dim, rotary_dim, dtype, function) -> None:
    case = make_case(num_tokens, head_dim=head_dim, rotary_dim=rotary_dim, dtype=dtype)
    for actual, expected in zip(function(*case), apply_rotary_reference(*case), strict=True):
        torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_reference_turns_pairs_as_complex_numbers() -> None:
    """Entry i and i + D/2 are the parts of a number that is multiplied by exp(i * angle)."""
    q, k, _, _ = make_case(4, head_dim=8)
    angles = torch.rand(4, 4)
    both = torch.cat((angles, angles), dim=1)
    turned, _ = apply_rotary_reference(q, k, both.cos(), both.sin())
    pairs = torch.complex(q[..., :4], q[..., 4:]) * torch.polar(torch.ones(4, 4), angles)[:, None]
    torch.testing.assert_close(turned, torch.cat((pairs.real, pairs.imag), dim=-1))


@pytest.mark.parametrize("function", [apply_rotary_torch, apply_rotary_cpp])
def test_strided_views_of_a_fused_projection(function) -> None:
    q, k, cos, sin = make_case(5, heads=4, kv_heads=2, head_dim=8)
    fused = torch.cat((q, k, k), dim=1)
    views = fused.split([4, 2, 2], dim=1)
    expected = function(q, k, cos, sin)
    actual = function(views[0], views[1], cos, sin)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert torch.equal(fused, torch.cat((q, k, k), dim=1))  # copies were returned


@pytest.mark.parametrize("function", [apply_rotary_reference, apply_rotary_torch, apply_rotary_cpp])
@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (1, torch.zeros(4, 1, 24), ValueError, "k has shape"),
        (2, torch.zeros(3, 23), ValueError, "sin has shape"),
        (2, torch.zeros(3, 24, dtype=torch.float16), TypeError, "cos has dtype"),
    ],
)
def test_wrong_arguments_are_named(function, index, value, error, message) -> None:
    case = list(make_case(3))
    case[index] = value
    with pytest.raises(error, match=message):
        function(*case)


def test_an_odd_rotary_size_is_refused() -> None:
    q, k, _, _ = make_case(3)
    with pytest.raises(ValueError, match="rotary_dim is 5"):
        apply_rotary_torch(q, k, torch.zeros(3, 5), torch.zeros(3, 5))
