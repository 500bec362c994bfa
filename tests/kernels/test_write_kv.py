from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels.write_kv import write_kv_cpp, write_kv_reference, write_kv_torch


def make_case(num_tokens, *, block_size=8, kv_heads=3, head_dim=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_tokens)
    key, value = torch.randn(2, num_tokens, kv_heads, head_dim, generator=generator).to(dtype)
    caches = torch.randn(2, 9, block_size, kv_heads, head_dim, generator=generator).to(dtype)
    slots = torch.randperm(9 * block_size, generator=generator)[:num_tokens]
    return key, value, caches[0].clone(), caches[1].clone(), slots


@pytest.mark.parametrize("function", [write_kv_torch, write_kv_cpp])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_tokens", "block_size"), [(0, 8), (1, 8), (13, 16), (70, 8), (31, 32), (280, 32)])
def test_equals_the_reference_bit_for_bit(num_tokens, block_size, dtype, function) -> None:
    case, twin = (make_case(num_tokens, block_size=block_size, dtype=dtype) for _ in range(2))
    function(*case)
    write_kv_reference(*twin)
    assert torch.equal(case[2], twin[2])
    assert torch.equal(case[3], twin[3])


def test_reference_writes_the_slots_and_nothing_else() -> None:
    key, value, keys, values, _ = make_case(2)
    before = keys.clone()
    write_kv_reference(key, value, keys, values, torch.tensor([8 * 4 + 5, 0]))
    assert torch.equal(keys[4, 5], key[0])
    assert torch.equal(values[0, 0], value[1])
    keys[4, 5], keys[0, 0] = before[4, 5], before[0, 0]
    assert torch.equal(keys, before)


@pytest.mark.parametrize("function", [write_kv_torch, write_kv_cpp])
def test_strided_keys_of_a_fused_projection(function) -> None:
    key, value, keys, values, slots = make_case(6)
    fused = torch.cat((torch.zeros(6, 2, 24), key, value), dim=1)
    _, key_view, value_view = fused.split([2, 3, 3], dim=1)
    function(key_view, value_view, keys, values, slots)
    assert torch.equal(keys.flatten(0, 1)[slots], key)
    assert torch.equal(values.flatten(0, 1)[slots], value)


@pytest.mark.parametrize("function", [write_kv_reference, write_kv_torch, write_kv_cpp])
@pytest.mark.parametrize("slot", [72, -1000])
def test_a_slot_outside_the_cache_is_an_error(function, slot) -> None:
    key, value, keys, values, _ = make_case(1)
    with pytest.raises(IndexError):
        function(key, value, keys, values, torch.tensor([slot]))


@pytest.mark.parametrize("function", [write_kv_reference, write_kv_torch, write_kv_cpp])
@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(4, 3, 25), ValueError, "key has shape"),
        (1, torch.zeros(4, 3, 24, dtype=torch.float16), TypeError, "value has dtype"),
        (2, torch.zeros(9, 8, 24, 3).transpose(2, 3), ValueError, "key_cache has strides"),
        (4, torch.zeros(5, dtype=torch.int64), ValueError, "slot_mapping has shape"),
        (4, torch.zeros(4, dtype=torch.int32), TypeError, "slot_mapping has dtype"),
    ],
)
def test_wrong_arguments_are_named(function, index, value, error, message) -> None:
    case = list(make_case(4))
    case[index] = value
    with pytest.raises(error, match=message):
        function(*case)
