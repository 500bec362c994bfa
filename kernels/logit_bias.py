"""Biases of single tokens.

    logits[rows[i], ids[i]] += bias[i],  in place

logits: float32 [R, vocab]. rows, ids: int64 [N], each pair once and in range. bias: float32 [N].
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vlm.kernels.checks import check_dtype, check_shape


def add_bias(logits: Tensor, *, rows: Tensor, ids: Tensor, bias: Tensor) -> None:
    op = "add_bias"
    check_shape(op, "logits", logits, (None, None))
    for name, tensor in (("rows", rows), ("ids", ids)):
        check_dtype(op, name, tensor, torch.int64)
        check_shape(op, name, tensor, tuple(bias.shape))
    logits.index_put_((rows, ids), logits[rows, ids] + bias)
