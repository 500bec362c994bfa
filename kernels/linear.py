"""y = x W^T + b, with W in the order that the processor's matrix kernel reads it.

x: [T, in_features], weight: [out_features, in_features] as it is or packed, bias: [out_features] or None, all of one
dtype -> [T, out_features]. On a CPU oneDNN reorders a bfloat16 weight in every call unless it finds it packed, or
reads it slowly: of one row, at half the memory's speed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def can_pack(weight: Tensor) -> bool:
    """Whether `pack` has a faster form for this weight: a bfloat16 matrix on a CPU with the instructions for it."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or 0 in weight.shape or weight.is_mkldnn:
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(weight: Tensor) -> Tensor:
    """The same matrix in oneDNN's own order, a copy; only `linear` reads it. See `can_pack`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x may have any leading axes."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
