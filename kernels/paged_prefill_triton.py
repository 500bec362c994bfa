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

_TILE_POSITIONS = 32


def attend_tiles(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, plan: TritonPlan, out: Tensor, scale: float
) -> None:
    assert plan.tiles is not None
    _, heads, head_dim = q.shape
    kv_heads = key_cache.shape[2]
    wide = triton.next_power_of_2(max(16, head_dim))
    exact = q.dtype == torch.float32
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
        rows=TILE_ROWS if not exact and wide <= 128 else 64,
        tile_rows=TILE_ROWS,
        positions=_TILE_POSITIONS,
        precision="ieee" if exact else "tf32",
        num_warps=4,
        num_stages=2,
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
    tile_rows: tl.constexpr,
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
    for part in tl.static_range(tile_rows // rows):
        row = part * rows + tl.arange(0, rows)
        row_mask = (row < num_rows)[:, None] & in_head[None, :]
        q_rows = q + (first_row + row)[:, None] * q_stride + head * q_head_stride + columns[None, :]
        queries = tl.load(q_rows, mask=row_mask, other=0.0)
        best = tl.full((rows,), float("-inf"), tl.float32)
        weight = tl.zeros((rows,), tl.float32)
        acc = tl.zeros((rows, wide), tl.float32)
        last = first_position + tl.minimum(part * rows + rows, num_rows)
        if part * rows >= num_rows:
            last = 0
        # Up to `whole` every row sees every position, so that there is nothing to mask.
        whole = (first_position + part * rows + 1) // positions * positions
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
