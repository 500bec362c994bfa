"""Attention of prefill chunks in Triton: tiles of queries, each a program a head.

Online softmax: Milakov and Gimelshein, 2018; tiles: Dao et al., "FlashAttention", 2022.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_vlm.kernels.early_start_triton import await_previous, launch_early, start_next
from dist_vlm.kernels.paged_plan_triton import TILE_ROWS, VARYING, TritonPlan

# Positions that are read together and stages of them, by the number of programs that full tiles would be: up to 4 a
# processor of an H200 each has much of it to itself, beyond that what it takes keeps others away.
_FEW_PROGRAMS = 528
_POSITIONS_OF_FEW, _POSITIONS = (64, 3), (32, 2)


def attend_tiles(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, plan: TritonPlan, out: Tensor, scale: float
) -> None:
    assert plan.tiles is not None
    num_tokens, heads, head_dim = q.shape
    kv_heads = key_cache.shape[2]
    wide = triton.next_power_of_2(max(16, head_dim))
    exact = q.dtype == torch.float32
    few = heads * triton.cdiv(num_tokens, TILE_ROWS) <= _FEW_PROGRAMS and not exact and wide <= 128
    positions, stages = _POSITIONS_OF_FEW if few else _POSITIONS
    _prefill_kernel[(heads, plan.tiles.shape[0])](
        q,
        key_cache,
        value_cache,
        out,
        plan.tiles,
        plan.block_tables,
        plan.block_tables.stride(0),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        scale * math.log2(math.e),
        heads // kv_heads,
        kv_heads=kv_heads,
        block_size=plan.block_size,
        head_dim=head_dim,
        wide=wide,
        rows=TILE_ROWS,
        positions=positions,
        precision="ieee" if exact else "tf32",
        num_warps=4,
        num_stages=stages,
        **launch_early(),
    )


@triton.jit(do_not_specialize=VARYING)
def _prefill_kernel(
    q,
    key_cache,
    value_cache,
    out,
    tiles,
    block_tables,
    table_stride,
    q_stride,
    q_head_stride,
    out_stride,
    scale,
    group,
    kv_heads: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    wide: tl.constexpr,
    rows: tl.constexpr,
    positions: tl.constexpr,
    precision: tl.constexpr,
    early: tl.constexpr = False,
):
    start_next(early)
    await_previous(early)
    head = tl.program_id(0)
    tile = tiles + tl.program_id(1) * 4
    first_row, num_rows = tl.load(tile).to(tl.int64), tl.load(tile + 1)
    if num_rows == 0:
        return
    table = block_tables + tl.load(tile + 2).to(tl.int64) * table_stride
    first_position = tl.load(tile + 3)
    columns = tl.arange(0, wide)
    in_head = columns < head_dim
    head_offset = (head // group) * head_dim
    row = tl.arange(0, rows)
    row_mask = (row < num_rows)[:, None] & in_head[None, :]
    q_rows = q + (first_row + row)[:, None] * q_stride + head * q_head_stride + columns[None, :]
    queries = tl.load(q_rows, mask=row_mask, other=0.0)
    best = tl.full((rows,), float("-inf"), tl.float32)
    weight = tl.zeros((rows,), tl.float32)
    acc = tl.zeros((rows, wide), tl.float32)
    last = first_position + num_rows
    # Up to `whole` every row sees every position, so that there is nothing to mask.
    whole = (first_position + 1) // positions * positions
    whole = tl.minimum(whole, last // positions * positions)
    for start in range(0, whole, positions):
        position = start + tl.arange(0, positions)
        block = tl.load(table + position // block_size).to(tl.int64)
        place = (block * block_size + position % block_size) * (kv_heads * head_dim) + head_offset
        offsets = place[:, None] + columns[None, :]
        keys = tl.load(key_cache + offsets, mask=in_head[None, :], other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=precision) * scale
        new_best = tl.maximum(best, tl.max(scores, 1))
        shrink = tl.exp2(best - new_best)
        shares = tl.exp2(scores - new_best[:, None])
        values = tl.load(value_cache + offsets, mask=in_head[None, :], other=0.0)
        weight = weight * shrink + tl.sum(shares, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(shares.to(values.dtype), values, acc, input_precision=precision)
        best = new_best
    for start in range(whole, last, positions):
        position = start + tl.arange(0, positions)
        inside = position < last
        block = tl.load(table + position // block_size, mask=inside, other=0).to(tl.int64)
        place = (block * block_size + position % block_size) * (kv_heads * head_dim) + head_offset
        offsets = place[:, None] + columns[None, :]
        kv_mask = inside[:, None] & in_head[None, :]
        keys = tl.load(key_cache + offsets, mask=kv_mask, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=precision) * scale
        seen = position[None, :] <= (first_position + row)[:, None]
        scores = tl.where(seen & inside[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        shrink = tl.exp2(best - new_best)
        shares = tl.exp2(scores - new_best[:, None])
        values = tl.load(value_cache + offsets, mask=kv_mask, other=0.0)
        weight = weight * shrink + tl.sum(shares, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(shares.to(values.dtype), values, acc, input_precision=precision)
        best = new_best
    result = acc / weight[:, None]
    out_rows = out + (first_row + row)[:, None] * out_stride + head * head_dim + columns[None, :]
    tl.store(out_rows, result.to(out.dtype.element_ty), mask=row_mask)
