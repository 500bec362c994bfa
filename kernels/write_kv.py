"""Scatters new keys and values into the block-table cache.

    key_cache[slot_mapping[t] // block_size, slot_mapping[t] % block_size] = key[t], values alike

key, value: [T, kv_heads, D], any strides; key_cache, value_cache: [num_blocks, block_size, kv_heads, D],
contiguous, of key's dtype; slot_mapping: int64 [T], distinct, in [0, num_blocks * block_size).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vlm.kernels import cpp_library
from dist_vlm.kernels.checks import check_dense, check_dtype, check_shape


def check_inputs(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    op = "write_kv"
    check_shape(op, "key", key, (None, *key_cache.shape[2:]))
    check_shape(op, "value", value, tuple(key.shape))
    check_shape(op, "key_cache", key_cache, (None, None, None, None))
    check_shape(op, "value_cache", value_cache, tuple(key_cache.shape))
    check_shape(op, "slot_mapping", slot_mapping, (key.shape[0],))
    check_dtype(op, "slot_mapping", slot_mapping, torch.int64)
    for name, tensor in (("value", value), ("key_cache", key_cache), ("value_cache", value_cache)):
        check_dtype(op, name, tensor, key.dtype)
    check_dense(op, "key_cache", key_cache)
    check_dense(op, "value_cache", value_cache)


def write_kv_reference(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    check_inputs(key, value, key_cache, value_cache, slot_mapping)
    block_size = key_cache.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        if not 0 <= slot < key_cache.shape[0] * block_size:
            raise IndexError(f"write_kv: slot {slot} of token {token} is outside the cache")
        key_cache[slot // block_size, slot % block_size] = key[token]
        value_cache[slot // block_size, slot % block_size] = value[token]


def write_kv_torch(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """A slot outside the cache raises `IndexError` on a CPU and is a device assertion on a GPU."""
    check_inputs(key, value, key_cache, value_cache, slot_mapping)
    key_cache.flatten(0, 1).index_copy_(0, slot_mapping, key)
    value_cache.flatten(0, 1).index_copy_(0, slot_mapping, value)


def write_kv_cpp(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """A slot outside the cache raises `IndexError`, and nothing is written."""
    check_inputs(key, value, key_cache, value_cache, slot_mapping)
    key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (key, value))
    slot_mapping = slot_mapping.contiguous()
    num_tokens, heads, head_dim = key.shape
    num_slots, item = key_cache.shape[0] * key_cache.shape[1], key.element_size()
    wrong = cpp_library.library().write_rows(
        key.data_ptr(),
        value.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        slot_mapping.data_ptr(),
        num_tokens,
        num_slots,
        heads,
        head_dim * item,
        key.stride(0) * item,
        key.stride(1) * item,
        value.stride(0) * item,
        value.stride(1) * item,
    )
    if wrong >= 0:
        raise IndexError(f"write_kv: slot {int(slot_mapping[wrong])} of token {wrong} is outside the cache")
