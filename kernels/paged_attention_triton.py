"""`paged_attention` in Triton: over one plan (`paged_plan_triton.py`), kernels for sequences with one token
(`paged_decode_triton.py`) and for those with several (`paged_prefill_triton.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vlm.kernels.paged_attention import check_inputs
from dist_vlm.kernels.paged_decode_triton import attend_singles
from dist_vlm.kernels.paged_plan_triton import TritonPlan
from dist_vlm.kernels.paged_prefill_triton import attend_tiles

# float32 numbers that hold the parts of a decoding batch: D + 2 a part and head, of sequences few enough to be split.
TRITON_WORKSPACE_BYTES = 64 << 20


def paged_attention_triton(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, plan: TritonPlan, *, scale: float
) -> Tensor:
    """Reads the cache where it lies; products of the dtype, sums in float32, rounded once."""
    check_inputs(q, key_cache, value_cache, num_tokens=plan.num_tokens, block_size=plan.block_size)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if plan.tiles is not None:
        attend_tiles(q, key_cache, value_cache, plan, out, scale)
    if plan.decodes is not None:
        attend_singles(q, key_cache, value_cache, plan, out, scale)
    return out
