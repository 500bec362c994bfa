"""Attention of new tokens over the block-table cache, which is given their keys and values first.

    q = rotary_write_kv(q, k, v, cos, sin, key_cache, value_cache, slot_mapping)     (kernels/rotary_write_kv.py)
    out = paged_attention(q, key_cache, value_cache, plan, scale=scale)              (kernels/paged_attention.py)

Shapes and dtypes are those of the two. out: [T, heads, D].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def one_after_the_other(
    rotary_write_kv: Callable[..., Tensor], paged_attention: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """The two ops as one."""

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
        plan: Any,
        *,
        scale: float,
    ) -> Tensor:
        q = rotary_write_kv(q, k, v, cos, sin, key_cache, value_cache, slot_mapping)
        return paged_attention(q, key_cache, value_cache, plan, scale=scale)

    return attention
