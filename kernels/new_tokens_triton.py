"""Tokens whose keys and values the cache does not have yet, for kernels that rotate, write and attend at once."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Of each row of q what the cache does not have yet, as `dist_vlm.kernels.rotary_write_kv` takes it.

    keys, values: [N, kv_heads, D], not rotated, as q is not. cos, sin: [N, R]. slot_mapping: int64 [N].
    The last axes are dense.
    """

    keys: Tensor
    values: Tensor
    cos: Tensor
    sin: Tensor
    slot_mapping: Tensor

    def arguments(self) -> tuple[Tensor | int, ...]:
        """What a kernel is given, in the order of `NO_NEW_TOKENS`: tensors, and strides."""
        return (
            *(self.keys, self.values, self.cos, self.sin, self.slot_mapping),
            *(*self.keys.stride()[:2], *self.values.stride()[:2]),
            *(self.cos.stride(0), self.sin.stride(0), self.slot_mapping.stride(0)),
        )


NO_NEW_TOKENS = (None,) * 5 + (0,) * 7


@triton.jit
def turned(heads, columns, mask, cos, sin, half: tl.constexpr):
    """Numbers of heads after the rotary embedding, float32. heads: where each begins. cos, sin: the token's."""
    turns = columns < 2 * half
    partner = tl.where(columns < half, columns + half, columns - half)
    numbers = tl.load(heads + columns, mask=mask, other=0.0).to(tl.float32)
    partners = tl.load(heads + partner, mask=mask & turns, other=0.0).to(tl.float32)
    by_cos = tl.load(cos + columns, mask=turns, other=1.0).to(tl.float32)
    by_sin = tl.load(sin + columns, mask=turns, other=0.0).to(tl.float32)
    return numbers * by_cos + tl.where(columns < half, -partners, partners) * by_sin


@triton.jit
def take_new(
    new_key, new_value, cos, sin, slot, key_cache, value_cache, head, columns, is_wanted, num_slots,
    kv_heads: tl.constexpr, head_dim: tl.constexpr, half: tl.constexpr,
):  # fmt: skip
    """A token's rotated key and its value of one head, written to the cache; zeros, and nothing, unless `is_wanted`.
    new_key, new_value: where they begin."""
    wanted = columns < tl.where(is_wanted, head_dim, 0)
    key = turned(new_key, columns, wanted, cos, sin, half).to(key_cache.dtype.element_ty)
    value = tl.load(new_value + columns, mask=wanted, other=0.0)
    kept = columns < tl.where(is_wanted & (slot >= 0) & (slot < num_slots), head_dim, 0)
    place = (slot * kv_heads + head) * head_dim + columns
    tl.store(key_cache + place, key, mask=kept)
    tl.store(value_cache + place, value, mask=kept)
    return key.to(tl.float32), value.to(tl.float32)
