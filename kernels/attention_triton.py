"""`attention` in Triton: one kernel for a batch of single tokens, else one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vlm.kernels import paged_attention, rotary_write_kv
from dist_vlm.kernels.attention import one_after_the_other
from dist_vlm.kernels.checks import check_float
from dist_vlm.kernels.new_tokens_triton import NewTokens
from dist_vlm.kernels.paged_attention_triton import paged_attention_triton
from dist_vlm.kernels.paged_decode_triton import attend_singles
from dist_vlm.kernels.paged_plan_triton import TritonPlan
from dist_vlm.kernels.rotary_write_kv_triton import rotary_write_kv_triton

_two_kernels = one_after_the_other(rotary_write_kv_triton, paged_attention_triton)


def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    plan: TritonPlan,
    *,
    scale: float,
) -> Tensor:
    """Computed in float32; rotated numbers are rounded before they are used. See `rotary_write_kv_triton` for slots
    that are not written; of a token with a context of 0 nothing is."""
    decodes = plan.decodes
    if plan.tiles is not None or decodes is None or decodes.tokens is not None:
        return _two_kernels(q, k, v, cos, sin, key_cache, value_cache, slot_mapping, plan, scale=scale)
    rotary_write_kv.check_inputs(q, k, v, cos, sin, key_cache, value_cache, slot_mapping)
    check_float("attention", "q", q)
    q, k, v, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, cos, sin))
    paged_attention.check_inputs(q, key_cache, value_cache, num_tokens=plan.num_tokens, block_size=plan.block_size)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    attend_singles(q, key_cache, value_cache, plan, out, scale, NewTokens(k, v, cos, sin, slot_mapping))
    return out
