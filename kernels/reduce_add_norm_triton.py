"""`reduce_add_norm` in Triton: sum, norm and weight of a row in one pass over it, a program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_vlm.kernels.checks import check_float
from dist_vlm.kernels.early_start_triton import await_previous, launch_early, start_next
from dist_vlm.kernels.reduce_add_norm import AllReduce, check_inputs

# Numbers of a thread: one read of 16 bytes of bfloat16. The wait for the first bytes is most of a short batch's time.
_THREAD_NUMBERS = 8
_MAX_WARPS = 16


def reduce_add_norm_triton(
    partial: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, all_reduce: AllReduce
) -> tuple[Tensor, Tensor]:
    """s takes the place of the partial sum. A row's result does not depend on the rows beside it. weight: written by no
    kernel that may still run."""
    check_inputs(partial, residual, weight)
    check_float("reduce_add_norm", "partial", partial)
    summed = all_reduce(partial)
    num_tokens, hidden = summed.shape
    normed = torch.empty_like(summed)
    if not normed.numel():
        return normed, summed
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    options = launch_early()
    if weight.stride(0) != 1:
        weight, options = weight.contiguous(), {}  # written just now, and the kernel would read it too early
    wide = triton.next_power_of_2(hidden)
    _add_norm_kernel[(num_tokens,)](
        summed,
        residual,
        weight,
        normed,
        hidden if residual is None else residual.stride(0),
        eps,
        hidden=hidden,
        wide=wide,
        num_warps=max(1, min(_MAX_WARPS, wide // (32 * _THREAD_NUMBERS))),
        **options,
    )
    return normed, summed


@triton.jit
def _add_norm_kernel(
    summed,
    residual,
    weight,
    normed,
    residual_stride,
    eps,
    hidden: tl.constexpr,
    wide: tl.constexpr,
    early: tl.constexpr = False,
):
    start_next(early)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, wide)
    inside = columns < hidden
    kind: tl.constexpr = normed.dtype.element_ty
    factors = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    await_previous(early)
    place = summed + row * hidden + columns
    total = tl.load(place, mask=inside, other=0.0)
    if residual is not None:
        old = tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0)
        total = (old.to(tl.float32) + total.to(tl.float32)).to(kind)
        tl.store(place, total, mask=inside)
    exact = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, axis=0) / hidden + eps)
    result = factors * (exact * scale).to(kind).to(tl.float32)
    tl.store(normed + row * hidden + columns, result.to(kind), mask=inside)
