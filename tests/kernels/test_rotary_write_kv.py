from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels.rotary_write_kv import rotary_write_kv_cpp, rotary_write_kv_reference, rotary_write_kv_torch

FUNCTIONS = [rotary_write_kv_reference, rotary_write_kv_torch, rotary_write_kv_cpp]


def make_case(num_tokens, *, heads=4, kv_heads=2, head_dim=8):
    generator = torch.Generator().manual_seed(num_tokens)
    q = torch.randn(num_tokens, heads, head_dim, generator=generator)
    k, v = torch.randn(2, num_tokens, kv_heads, head_dim, generator=generator)
    angles = 6 * torch.rand(num_tokens, head_dim // 2, generator=generator)
    caches = torch.randn(2, 5, 8, kv_heads, head_dim, generator=generator)
    slots = torch.randperm(40, generator=generator)[:num_tokens]
    return q, k, v, angles, caches, slots


def turned(x, angles):
    """Entry i and i + D/2 are the parts of a number that is multiplied by exp(i * angle)."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((pairs.real, pairs.imag), dim=-1)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_turns_queries_and_keys_and_writes_keys_and_values(num_tokens, function) -> None:
    q, k, v, angles, caches, slots = make_case(num_tokens)
    both = torch.cat((angles, angles), dim=1)
    expected = caches.clone().flatten(1, 2)
    expected[0, slots], expected[1, slots] = turned(k, angles), v
    before = [x.clone() for x in (q, k, v)]
    rotated = function(q, k, v, both.cos(), both.sin(), caches[0], caches[1], slots)
    torch.testing.assert_close(rotated, turned(q, angles))
    torch.testing.assert_close(caches.flatten(1, 2), expected)
    assert all(torch.equal(x, was) for x, was in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("slot", [40, -1000])
def test_a_slot_outside_the_cache_is_an_error(slot, function) -> None:
    q, k, v, angles, caches, _ = make_case(1)
    both = torch.cat((angles, angles), dim=1)
    with pytest.raises(IndexError):
        function(q, k, v, both.cos(), both.sin(), caches[0], caches[1], torch.tensor([slot]))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (1, torch.zeros(4, 2, 10), ValueError, "apply_rotary: k has shape"),
        (2, torch.zeros(4, 3, 8), ValueError, "write_kv: value has shape"),
        (3, torch.zeros(4, 8, dtype=torch.float16), TypeError, "apply_rotary: cos has dtype"),
        (5, torch.zeros(5, 8, 3, 8), ValueError, "write_kv: key has shape"),
        (7, torch.zeros(4, dtype=torch.int32), TypeError, "write_kv: slot_mapping has dtype"),
    ],
)
def test_wrong_arguments_are_named(index, value, error, message, function) -> None:
    q, k, v, angles, caches, slots = make_case(4)
    both = torch.cat((angles, angles), dim=1)
    case = [q, k, v, both.cos(), both.sin(), caches[0], caches[1], slots]
    case[index] = value
    with pytest.raises(error, match=message):
        function(*case)
