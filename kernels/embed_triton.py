"""`embed` in Triton: a program has a part of one token's row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_vlm.kernels.checks import check_float
from dist_vlm.kernels.embed import check_inputs

# With 4 warps, 16 bytes of bfloat16 a thread.
_TILE = 1024


def embed_triton(
    ids: Tensor,
    table: Tensor,
    *,
    first: int = 0,
    feature_rows: Tensor | None = None,
    features: Tensor | None = None,
) -> Tensor:
    check_inputs(ids, table, feature_rows, features)
    check_float("embed", "table", table)
    num_tokens, hidden = ids.shape[0], table.shape[1]
    out = torch.empty((num_tokens, hidden), dtype=table.dtype, device=table.device)
    if out.numel():
        programs = num_tokens * triton.cdiv(hidden, _TILE)
        _embed_kernel[(programs,)](
            ids,
            table,
            first,
            table.shape[0],
            feature_rows,
            features,
            0 if features is None else features.shape[0],
            out,
            hidden=hidden,
            tile=_TILE,
            num_warps=4,
        )
    return out


# Of what may differ from batch to batch only the features' place is looked at: their rows are read 16 bytes at a time.
@triton.jit(do_not_specialize=["ids", "first", "num_rows", "feature_rows", "num_features"])
def _embed_kernel(
    ids,
    table,
    first,
    num_rows,
    feature_rows,
    features,
    num_features,
    out,
    hidden: tl.constexpr,
    tile: tl.constexpr,
):
    """feature_rows, features: None where there are none."""
    parts: tl.constexpr = (hidden + tile - 1) // tile
    token = (tl.program_id(0) // parts).to(tl.int64)
    columns = (tl.program_id(0) % parts) * tile + tl.arange(0, tile)
    row = tl.load(ids + token) - first
    source = table + row * hidden
    is_held = (row >= 0) & (row < num_rows)
    if feature_rows is not None:
        feature_row = tl.load(feature_rows + token)
        if features is None:
            is_held = is_held & (feature_row < 0)
        else:
            source = tl.where(feature_row < 0, source, features + feature_row * hidden)
            is_held = tl.where(feature_row < 0, is_held, feature_row < num_features)
    # As a number of columns: the interpreter makes no mask of a scalar and a tensor.
    values = tl.load(source + columns, mask=columns < tl.where(is_held, hidden, 0), other=0.0)
    tl.store(out + token * hidden + columns, values, mask=columns < hidden)
