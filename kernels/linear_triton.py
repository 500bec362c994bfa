"""`linear` on a GPU. Of one row it takes as long as the weight takes to be read, which a kernel of its own does at the
memory's speed; of more rows it is torch's.

    y[n] = sum over k of x[k] * W[n, k] + b[n]        sums in float32, rounded once
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
import triton
import triton.language as tl
from torch import Tensor

# Outputs of a program, and numbers of their rows read together: 64 bytes a thread with 8 warps.
_OUTPUTS = 4
_TILE = 2048


def linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x may have any leading axes. weight: [out_features, in_features], dense rows."""
    if x.numel() != weight.shape[1] or not x.is_contiguous() or weight.stride(1) != 1 or x.dtype != weight.dtype:
        return F.linear(x, weight, bias)
    out_features, in_features = weight.shape
    out = x.new_empty((*x.shape[:-1], out_features))
    tile = min(_TILE, triton.next_power_of_2(in_features))
    _one_row_kernel[(triton.cdiv(out_features, _OUTPUTS),)](
        x,
        weight,
        bias,
        out,
        weight.stride(0),
        out_features,
        in_features=in_features,
        outputs=_OUTPUTS,
        tile=tile,
        num_warps=max(1, tile // 256),
    )
    return out


@triton.jit
def _one_row_kernel(
    x, weight, bias, out, stride, out_features, in_features: tl.constexpr, outputs: tl.constexpr, tile: tl.constexpr
):
    row = tl.program_id(0) * outputs + tl.arange(0, outputs)
    exists = row < out_features
    columns = tl.arange(0, tile)
    # Added up over the threads at the end, once, and not in every round.
    acc = tl.zeros((outputs, tile), tl.float32)
    for start in range(0, in_features, tile):
        inside = start + columns < in_features
        numbers = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
        place = weight + row[:, None].to(tl.int64) * stride + (start + columns)[None, :]
        part = tl.load(place, mask=exists[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first")
        acc += part.to(tl.float32) * numbers[None, :]
    result = tl.sum(acc, 1)
    if bias is not None:
        result += tl.load(bias + row, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=exists)
