"""Attention of decoding sequences in Triton, with one query head a KV head and with groups of them.

The positions of a sequence are split into parts that run at the same time where the batch alone would leave the GPU
idle; a second kernel joins them. Dao et al., "Flash-Decoding", 2023.

With `NewTokens` the same kernel turns the queries and the new keys and writes the cache: the program that has a
sequence's last position takes its key and value from the projections, and no other one reads them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_vlm.kernels.early_start_triton import await_previous, launch_early, start_next
from dist_vlm.kernels.new_tokens_triton import NO_NEW_TOKENS, NewTokens, take_new, turned
from dist_vlm.kernels.paged_plan_triton import VARYING, DecodeSet, TritonPlan
from dist_vlm.kernels.triton_support import triton_interpreted

# Programs that fill a GPU when it decodes; parts are added until the batch has as many. Interpreted, each costs time.
_WANTED_PROGRAMS = 32 if triton_interpreted() else 1056
_MAX_PARTS, _FEW_PARTS = 16, 8


def attend_singles(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: TritonPlan,
    out: Tensor,
    scale: float,
    new: NewTokens | None = None,
) -> None:
    """new: what is rotated, written and attended to besides; the cache has the tokens before them alone."""
    decodes = plan.decodes
    assert decodes is not None
    _, heads, head_dim = q.shape
    kv_heads, num_seqs = key_cache.shape[2], decodes.contexts.shape[0]
    group = heads // kv_heads
    wide = triton.next_power_of_2(max(16, head_dim))
    parts = num_parts(num_seqs * kv_heads)
    partial = out
    if parts > 1:
        partial = torch.empty((num_seqs, heads, parts, head_dim + 2), dtype=torch.float32, device=q.device)
    exact = q.dtype == torch.float32
    kernel = _decode_kernel if group == 1 else _decode_group_kernel
    kernel[(kv_heads, num_seqs, parts)](
        q,
        key_cache,
        value_cache,
        partial,
        decodes.contexts if decodes.tokens is None else decodes.tokens,
        decodes.sequences,
        decodes.contexts,
        plan.block_tables,
        plan.block_tables.stride(0),
        1 if decodes.tokens is None else decodes.tokens.stride(0),
        decodes.sequences.stride(0),
        decodes.contexts.stride(0),
        parts,
        q.stride(0),
        q.stride(1),
        scale * math.log2(math.e),
        *(NO_NEW_TOKENS if new is None else new.arguments()),
        key_cache.shape[0] * key_cache.shape[1],
        first_rows=decodes.tokens is None,
        half=0 if new is None else new.cos.shape[1] // 2,
        kv_heads=kv_heads,
        group=group,
        group_wide=max(16, triton.next_power_of_2(group)),
        is_split=parts > 1,
        block_size=plan.block_size,
        head_dim=head_dim,
        wide=wide,
        positions=16 if group == 1 else 32 if exact or wide > 128 else 64,
        stages=3 if group == 1 else 2,
        precision="ieee" if exact else "tf32",
        num_warps=2 if group == 1 else 4,
        **launch_early(),
    )
    if parts > 1:
        _join(partial, out, decodes)


def _join(partial: Tensor, out: Tensor, decodes: DecodeSet) -> None:
    """partial: float32 [N, heads, parts, D + 2], of each part its sum, its highest score and its weight."""
    num_seqs, heads, parts, numbers = partial.shape
    _join_kernel[(heads, num_seqs)](
        partial,
        out,
        decodes.contexts if decodes.tokens is None else decodes.tokens,
        1 if decodes.tokens is None else decodes.tokens.stride(0),
        parts,
        first_rows=decodes.tokens is None,
        heads=heads,
        parts_wide=_MAX_PARTS if parts > _FEW_PARTS else _FEW_PARTS,
        head_dim=numbers - 2,
        wide=triton.next_power_of_2(max(16, numbers - 2)),
        num_warps=2,
        **launch_early(),
    )


def num_parts(num_programs: int) -> int:
    """Parts that the positions of each sequence are cut into, by the programs that there are without."""
    return max(1, min(_MAX_PARTS, _WANTED_PROGRAMS // max(1, num_programs)))


@triton.jit(do_not_specialize=VARYING)
def _decode_kernel(
    q,
    key_cache,
    value_cache,
    out,
    tokens,
    sequences,
    contexts,
    block_tables,
    table_stride,
    token_step,
    sequence_step,
    context_step,
    parts,
    q_stride,
    q_head_stride,
    scale,
    new_keys,
    new_values,
    cos,
    sin,
    slot_mapping,
    new_key_stride,
    new_key_head_stride,
    new_value_stride,
    new_value_head_stride,
    cos_stride,
    sin_stride,
    slot_step,
    num_slots,
    first_rows: tl.constexpr,
    half: tl.constexpr,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    group_wide: tl.constexpr,
    is_split: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    wide: tl.constexpr,
    positions: tl.constexpr,
    stages: tl.constexpr,
    precision: tl.constexpr,
    early: tl.constexpr = False,
):
    """One query head a KV head, which the matrix units would compute sixteen times. Each lane of `positions` has a
    softmax of its own, so that lanes, which lie in different warps, wait for one another at the end alone."""
    start_next(early)
    await_previous(early)
    head, index, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(contexts + index * context_step).to(tl.int32)
    table = block_tables + tl.load(sequences + index * sequence_step).to(tl.int64) * table_stride
    row = index.to(tl.int64) if first_rows else tl.load(tokens + index * token_step).to(tl.int64)
    columns = tl.arange(0, wide)
    in_head = columns < head_dim
    kind: tl.constexpr = key_cache.dtype.element_ty
    queries = q + row * q_stride + head * q_head_stride
    if new_keys is None:
        query = tl.load(queries + columns, mask=in_head, other=0.0).to(tl.float32)
    else:
        cos += row * cos_stride
        sin += row * sin_stride
        query = turned(queries, columns, in_head, cos, sin, half).to(kind).to(tl.float32)
    query *= scale
    size = tl.cdiv(tl.cdiv(context, parts) if is_split else context, positions) * positions
    begin = part * size
    end = tl.minimum(begin + size, context)
    has_new = False
    if new_keys is not None:
        has_new = (begin < context) & (context <= begin + size)
        end = tl.minimum(end, context - 1)
    # Not minus infinity: the difference of two of them is no number.
    best = tl.full((positions,), -1e30, tl.float32)
    weight = tl.zeros((positions,), tl.float32)
    acc = tl.zeros((positions, wide), tl.float32)
    # Named here: a launch's number of stages is for loops with matrix products.
    for start in tl.range(begin, end, positions, num_stages=stages):
        position = start + tl.arange(0, positions)
        inside = position < end
        block = tl.load(table + position // block_size, mask=inside, other=0).to(tl.int64)
        place = (block * block_size + position % block_size) * (kv_heads * head_dim) + head * head_dim
        offsets = place[:, None] + columns[None, :]
        kv_mask = inside[:, None] if wide == head_dim else inside[:, None] & in_head[None, :]
        keys = tl.load(key_cache + offsets, mask=kv_mask, other=0.0).to(tl.float32)
        values = tl.load(value_cache + offsets, mask=kv_mask, other=0.0).to(tl.float32)
        scores = tl.where(inside, tl.sum(query[None, :] * keys, 1), float("-inf"))
        new_best = tl.maximum(best, scores)
        shrink = tl.exp2(best - new_best)
        shares = tl.exp2(scores - new_best)
        weight = weight * shrink + shares
        acc = acc * shrink[:, None] + shares[:, None] * values
        best = new_best
    highest = tl.max(best, 0)
    if new_keys is not None:
        new_key = new_keys + row * new_key_stride + head * new_key_head_stride
        new_value = new_values + row * new_value_stride + head * new_value_head_stride
        slot = tl.load(slot_mapping + row * slot_step)
        key, value = take_new(
            new_key, new_value, cos, sin, slot, key_cache, value_cache, head, columns, has_new, num_slots,
            kv_heads, head_dim, half,
        )  # fmt: skip
        score = tl.where(has_new, tl.sum(query * key, 0), -1e30)
        highest = tl.maximum(highest, score)
    factor = tl.exp2(best - highest)
    total = tl.sum(weight * factor, 0)
    result = tl.sum(acc * factor[:, None], 0)
    if new_keys is not None:
        share = tl.where(has_new, tl.exp2(score - highest), 0.0)
        total += share
        result += share * value
    if not is_split:
        result = result / tl.where(total == 0, 1.0, total)
        tl.store(out + (row * kv_heads + head) * head_dim + columns, result.to(out.dtype.element_ty), mask=in_head)
    else:
        place = ((index.to(tl.int64) * kv_heads + head) * parts + part) * (head_dim + 2)
        tl.store(out + place + columns, result, mask=in_head)
        tl.store(out + place + head_dim, highest)
        tl.store(out + place + head_dim + 1, total)


@triton.jit(do_not_specialize=VARYING)
def _decode_group_kernel(
    q,
    key_cache,
    value_cache,
    out,
    tokens,
    sequences,
    contexts,
    block_tables,
    table_stride,
    token_step,
    sequence_step,
    context_step,
    parts,
    q_stride,
    q_head_stride,
    scale,
    new_keys,
    new_values,
    cos,
    sin,
    slot_mapping,
    new_key_stride,
    new_key_head_stride,
    new_value_stride,
    new_value_head_stride,
    cos_stride,
    sin_stride,
    slot_step,
    num_slots,
    first_rows: tl.constexpr,
    half: tl.constexpr,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    group_wide: tl.constexpr,
    is_split: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    wide: tl.constexpr,
    positions: tl.constexpr,
    stages: tl.constexpr,
    precision: tl.constexpr,
    early: tl.constexpr = False,
):
    start_next(early)
    await_previous(early)
    kv_head, index, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(contexts + index * context_step).to(tl.int32)
    table = block_tables + tl.load(sequences + index * sequence_step).to(tl.int64) * table_stride
    row = index.to(tl.int64) if first_rows else tl.load(tokens + index * token_step).to(tl.int64)
    columns = tl.arange(0, wide)
    in_head = columns < head_dim
    head = kv_head * group + tl.arange(0, group_wide)
    head_mask = (tl.arange(0, group_wide) < group)[:, None] & in_head[None, :]
    kind: tl.constexpr = key_cache.dtype.element_ty
    heads_of_q = q + row * q_stride + head[:, None] * q_head_stride
    if new_keys is None:
        queries = tl.load(heads_of_q + columns[None, :], mask=head_mask, other=0.0)
    else:
        cos += row * cos_stride
        sin += row * sin_stride
        queries = turned(heads_of_q, columns[None, :], head_mask, cos, sin, half).to(kind)
    size = tl.cdiv(tl.cdiv(context, parts) if is_split else context, positions) * positions
    begin = part * size
    end = tl.minimum(begin + size, context)
    has_new = False
    if new_keys is not None:
        has_new = (begin < context) & (context <= begin + size)
        end = tl.minimum(end, context - 1)
    best = tl.full((group_wide,), float("-inf"), tl.float32)
    weight = tl.zeros((group_wide,), tl.float32)
    acc = tl.zeros((group_wide, wide), tl.float32)
    for start in tl.range(begin, end, positions, num_stages=stages):
        position = start + tl.arange(0, positions)
        inside = position < end
        block = tl.load(table + position // block_size, mask=inside, other=0).to(tl.int64)
        place = (block * block_size + position % block_size) * (kv_heads * head_dim) + kv_head * head_dim
        offsets = place[:, None] + columns[None, :]
        kv_mask = inside[:, None] & in_head[None, :]
        keys = tl.load(key_cache + offsets, mask=kv_mask, other=0.0)
        values = tl.load(value_cache + offsets, mask=kv_mask, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision=precision) * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        shrink = tl.exp2(best - new_best)
        shares = tl.exp2(scores - new_best[:, None])
        weight = weight * shrink + tl.sum(shares, 1)
        acc = tl.dot(shares.to(values.dtype), values, acc * shrink[:, None], input_precision=precision)
        best = new_best
    if new_keys is not None:
        new_key = new_keys + row * new_key_stride + kv_head * new_key_head_stride
        new_value = new_values + row * new_value_stride + kv_head * new_value_head_stride
        slot = tl.load(slot_mapping + row * slot_step)
        key, value = take_new(
            new_key, new_value, cos, sin, slot, key_cache, value_cache, kv_head, columns, has_new, num_slots,
            kv_heads, head_dim, half,
        )  # fmt: skip
        if has_new:
            new_scores = tl.sum(queries.to(tl.float32) * key[None, :], 1) * scale
            new_best = tl.maximum(best, new_scores)
            shrink = tl.exp2(best - new_best)
            new_shares = tl.exp2(new_scores - new_best)
            weight = weight * shrink + new_shares
            acc = acc * shrink[:, None] + new_shares[:, None] * value[None, :]
            best = new_best
    if not is_split:
        result = acc / tl.where(weight == 0, 1.0, weight)[:, None]
        place = row * (kv_heads * group * head_dim) + head[:, None] * head_dim + columns[None, :]
        tl.store(out + place, result.to(out.dtype.element_ty), mask=head_mask)
    else:
        place = ((index.to(tl.int64) * (kv_heads * group) + head) * parts + part) * (head_dim + 2)
        in_group = tl.arange(0, group_wide) < group
        tl.store(out + place[:, None] + columns[None, :], acc, mask=head_mask)
        tl.store(out + place + head_dim, best, mask=in_group)
        tl.store(out + place + head_dim + 1, weight, mask=in_group)


@triton.jit(do_not_specialize=VARYING)
def _join_kernel(
    partial,
    out,
    tokens,
    token_step,
    parts,
    first_rows: tl.constexpr,
    heads: tl.constexpr,
    parts_wide: tl.constexpr,
    head_dim: tl.constexpr,
    wide: tl.constexpr,
    early: tl.constexpr = False,
):
    start_next(early)
    await_previous(early)
    head, index = tl.program_id(0), tl.program_id(1)
    row = index.to(tl.int64) if first_rows else tl.load(tokens + index * token_step).to(tl.int64)
    part = tl.arange(0, parts_wide)
    columns = tl.arange(0, wide)
    in_head = columns < head_dim
    place = ((index.to(tl.int64) * heads + head) * parts + part) * (head_dim + 2)
    exists = part < parts
    best = tl.load(partial + place + head_dim, mask=exists, other=float("-inf"))
    weight = tl.load(partial + place + head_dim + 1, mask=exists, other=0.0)
    acc = tl.load(partial + place[:, None] + columns[None, :], mask=exists[:, None] & in_head[None, :], other=0.0)
    highest = tl.max(best, 0)
    # A row without positions has no highest score, and its parts weigh nothing.
    factor = tl.where(weight == 0, 0.0, tl.exp2(best - highest))
    total = tl.sum(weight * factor, 0)
    result = tl.sum(acc * factor[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + row * (heads * head_dim) + head * head_dim + columns, result.to(out.dtype.element_ty), mask=in_head)
