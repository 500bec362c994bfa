"""Rotary position embedding of queries and keys, and the keys and values put into the block-table cache.

    q, k = apply_rotary(q, k, cos, sin)                               (kernels/rotary.py)
    write_kv(k, v, key_cache, value_cache, slot_mapping)              (kernels/write_kv.py)

q: [T, heads, D], k, v: [T, kv_heads, D], any strides; cos, sin: [T, R], R even, R <= D; key_cache, value_cache:
[num_blocks, block_size, kv_heads, D], contiguous, all of one dtype; slot_mapping: int64 [T], distinct, in
[0, num_blocks * block_size) -> a rotated copy of q. The rotated keys go to the cache alone.
"""

from __future__ import annotations

from torch import Tensor

from dist_vlm.kernels import rotary, write_kv
from dist_vlm.kernels.rotary import apply_rotary_cpp, apply_rotary_reference, apply_rotary_torch
from dist_vlm.kernels.write_kv import write_kv_cpp, write_kv_reference, write_kv_torch


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    """What the two ops check, each in its own name."""
    rotary.check_inputs(q, k, cos, sin)
    write_kv.check_inputs(k, v, key_cache, value_cache, slot_mapping)


def rotary_write_kv_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    q, k = apply_rotary_reference(q, k, cos, sin)
    write_kv_reference(k, v, key_cache, value_cache, slot_mapping)
    return q


def rotary_write_kv_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    q, k = apply_rotary_torch(q, k, cos, sin)
    write_kv_torch(k, v, key_cache, value_cache, slot_mapping)
    return q


def rotary_write_kv_cpp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    q, k = apply_rotary_cpp(q, k, cos, sin)
    write_kv_cpp(k, v, key_cache, value_cache, slot_mapping)
    return q
