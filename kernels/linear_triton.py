"""`linear` on a GPU. Of few rows it takes as long as the weight takes to be read: kernels of our own, which for a 7B
model's weights on an H200 read at more of the memory's speed than torch's. The others are torch's.

    y[m, n] = sum over k of x[m, k] * W[n, k] + b[n]        sums in float32, rounded once
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
import triton
import triton.language as tl
from torch import Tensor

from dist_vlm.kernels.early_start_triton import await_previous, launch_early, start_next
from dist_vlm.kernels.few_rows_triton import MAX_ROWS, few_rows, takes, tiles_for

# Numbers of a row read together: with 4 warps, 16 bytes of bfloat16 a thread.
_TILE = 1024
# Outputs of a program, where a few long rows are to be read, and where many or short ones.
_OUTPUTS_OF_FEW, _OUTPUTS = 8, 4
_FEW_OUTPUTS, _LONG_ROW = 4096, 4096


def linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x may have any leading axes. weight: [out_features, in_features], written by no kernel that may still run: it is
    read before they have ended."""
    out_features, in_features = weight.shape
    num_rows = x.numel() // max(1, in_features)
    plain = x.is_contiguous() and weight.stride(1) == 1 and (bias is None or bias.is_contiguous())
    if not 0 < num_rows <= MAX_ROWS or not plain or x.dtype != weight.dtype:
        return F.linear(x, weight, bias)
    if num_rows == 1:
        return _one_row(x, weight, bias)
    if takes(x, weight):
        return few_rows(x, weight, bias, tiles_for(num_rows, out_features))
    return F.linear(x, weight, bias)


def _one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out_features, in_features = weight.shape
    out = x.new_empty((*x.shape[:-1], out_features))
    outputs = _OUTPUTS_OF_FEW if out_features <= _FEW_OUTPUTS and in_features >= _LONG_ROW else _OUTPUTS
    tile = min(_TILE, triton.next_power_of_2(in_features))
    _one_row_kernel[(triton.cdiv(out_features, outputs),)](
        x,
        weight,
        bias,
        out,
        weight.stride(0),
        out_features,
        in_features=in_features,
        outputs=outputs,
        tile=tile,
        num_warps=max(1, tile // 256),
        **launch_early(),
    )
    return out


@triton.jit
def _one_row_kernel(
    x,
    weight,
    bias,
    out,
    stride,
    out_features,
    in_features: tl.constexpr,
    outputs: tl.constexpr,
    tile: tl.constexpr,
    early: tl.constexpr = False,
):
    start_next(early)
    row = tl.program_id(0) * outputs + tl.arange(0, outputs)
    exists = (row < out_features)[:, None]
    columns = tl.arange(0, tile)
    weights = weight + row[:, None].to(tl.int64) * stride + columns[None, :]
    # The first are on their way while the kernel before ends.
    part = tl.load(weights, mask=exists & (columns < in_features)[None, :], other=0.0, eviction_policy="evict_first")
    await_previous(early)
    # Added up over the threads at the end, once, and not in every round.
    acc = part.to(tl.float32) * tl.load(x + columns, mask=columns < in_features, other=0.0).to(tl.float32)[None, :]
    for start in range(tile, in_features, tile):
        inside = start + columns < in_features
        numbers = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
        part = tl.load(weights + start, mask=exists & inside[None, :], other=0.0, eviction_policy="evict_first")
        acc += part.to(tl.float32) * numbers[None, :]
    result = tl.sum(acc, 1)
    if bias is not None:
        result += tl.load(bias + row, mask=row < out_features, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=row < out_features)
