"""The only reduction between layers: sum over the ranks, residual add and RMSNorm.

    s = residual + sum over ranks of partial        (s = the sum alone where residual is None)
    normed = weight * (s / sqrt(mean(s^2) + eps))

partial: [T, H], this rank's part of a row-parallel product, contiguous, consumed; residual: [T, H] or None,
consumed; weight: [H]; all of one dtype -> (normed, s), both [T, H]. s is rounded to the dtype; the norm is taken
in float32 of the rounded s and rounded to the dtype before the weight multiplies it, which is the order of
transformers' RMSNorm modules. Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.

all_reduce: sums a tensor over the ranks in place and returns it; the identity for one rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dist_vlm.kernels import cpp_library
from dist_vlm.kernels.checks import check_dense, check_dtype, check_shape

AllReduce = Callable[[Tensor], Tensor]


def check_inputs(partial: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    op = "reduce_add_norm"
    check_shape(op, "partial", partial, (None, weight.shape[0]))
    check_dense(op, "partial", partial)
    check_dtype(op, "weight", weight, partial.dtype)
    if residual is not None:
        check_shape(op, "residual", residual, tuple(partial.shape))
        check_dtype(op, "residual", residual, partial.dtype)


def reduce_add_norm_reference(
    partial: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, all_reduce: AllReduce
) -> tuple[Tensor, Tensor]:
    check_inputs(partial, residual, weight)
    dtype = partial.dtype
    total = all_reduce(partial).float()
    if residual is not None:
        total = residual.float() + total
    summed = total.to(dtype)
    exact = summed.float()
    mean_square = (exact * exact).sum(dim=-1, keepdim=True) / exact.shape[-1]
    normed = (exact / (mean_square + eps).sqrt()).to(dtype)
    return (weight.float() * normed.float()).to(dtype), summed


def reduce_add_norm_torch(
    partial: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, all_reduce: AllReduce
) -> tuple[Tensor, Tensor]:
    """The operations of transformers' RMSNorm modules in their order, in place where the arguments are consumed."""
    check_inputs(partial, residual, weight)
    summed = all_reduce(partial)
    if residual is not None:
        summed = residual.add_(summed)
    exact = summed.to(torch.float32)
    scale = exact.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return weight * (exact * scale).to(summed.dtype), summed


def reduce_add_norm_cpp(
    partial: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, all_reduce: AllReduce
) -> tuple[Tensor, Tensor]:
    """Sum, norm and weight of a row in one pass over it; s takes the place of the partial sum."""
    check_inputs(partial, residual, weight)
    summed = all_reduce(partial)
    normed = torch.empty_like(summed)
    old = None if residual is None else residual.contiguous()
    cpp_library.function("add_norm", summed.dtype)(
        summed.data_ptr(),
        None if old is None else old.data_ptr(),
        weight.contiguous().data_ptr(),
        normed.data_ptr(),
        *summed.shape,
        eps,
    )
    return normed, summed
