"""What a collective does with a row's sum."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_norm_row(
    total, row, columns, inside, residual, residual_stride, weight, summed, normed, eps, hidden: tl.constexpr
):
    """Adds the residual and takes the norm, as `dist_vlm.kernels.reduce_add_norm` says. weight None: stores the sum."""
    kind: tl.constexpr = summed.dtype.element_ty
    places = tl.cast(row, tl.int64) * hidden + columns
    if residual is not None:
        old = tl.load(residual + tl.cast(row, tl.int64) * residual_stride + columns, mask=inside, other=0.0)
        total = (old.to(tl.float32) + total.to(tl.float32)).to(kind)
    tl.store(summed + places, total, mask=inside)
    if weight is not None:
        factors = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        exact = tl.where(inside, total.to(tl.float32), 0.0)
        scale = tl.rsqrt(tl.sum(exact * exact, axis=0) / hidden + eps)
        result = factors * (exact * scale).to(kind).to(tl.float32)
        tl.store(normed + places, result.to(kind), mask=inside)
