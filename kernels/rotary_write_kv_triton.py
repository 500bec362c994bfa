"""`rotary_write_kv` in Triton: one pass, in which a program has some heads of one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_vlm.kernels.checks import check_float
from dist_vlm.kernels.early_start_triton import await_previous, launch_early, start_next
from dist_vlm.kernels.rotary_write_kv import check_inputs

# Numbers of one half of the heads of a program: with 4 warps, 16 bytes of bfloat16 a thread.
_TILE = 1024


def rotary_write_kv_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Computed in float32 and rounded once. A token whose slot is negative, or past the cache, is not written: a batch
    of fixed size is padded with slots of -1."""
    check_inputs(q, k, v, cos, sin, key_cache, value_cache, slot_mapping)
    check_float("rotary_write_kv", "q", q)
    q, k, v, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, cos, sin))
    num_tokens, heads, head_dim = q.shape
    kv_heads, half = k.shape[1], cos.shape[1] // 2
    rotated = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    half_wide = _wide(half)
    heads_wide = min(_wide(max(heads, kv_heads)), max(1, _TILE // half_wide))
    programs = num_tokens * (triton.cdiv(heads, heads_wide) + 2 * triton.cdiv(kv_heads, heads_wide))
    if programs == 0:
        return rotated
    _rotary_write_kv_kernel[(programs,)](
        q,
        k,
        v,
        cos,
        sin,
        rotated,
        key_cache,
        value_cache,
        slot_mapping,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        cos.stride(0),
        sin.stride(0),
        slot_mapping.stride(0),
        key_cache.shape[0] * key_cache.shape[1],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        half=half,
        heads_wide=heads_wide,
        half_wide=half_wide,
        rest_wide=_wide(head_dim - 2 * half),
        dim_wide=_wide(head_dim),
        num_warps=4,
        **launch_early(),
    )
    return rotated


def _wide(size: int) -> int:
    return max(1, triton.next_power_of_2(size))


@triton.jit(do_not_specialize=["slot_mapping", "slot_stride", "num_slots"])
def _rotary_write_kv_kernel(
    q,
    k,
    v,
    cos,
    sin,
    rotated,
    key_cache,
    value_cache,
    slot_mapping,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    cos_stride,
    sin_stride,
    slot_stride,
    num_slots,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    half: tl.constexpr,
    heads_wide: tl.constexpr,
    half_wide: tl.constexpr,
    rest_wide: tl.constexpr,
    dim_wide: tl.constexpr,
    early: tl.constexpr = False,
):
    start_next(early)
    q_parts: tl.constexpr = (heads + heads_wide - 1) // heads_wide
    kv_parts: tl.constexpr = (kv_heads + heads_wide - 1) // heads_wide
    parts: tl.constexpr = q_parts + 2 * kv_parts
    token = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    # In int64: heads may lie far apart.
    lanes = tl.arange(0, heads_wide).to(tl.int64)[:, None]
    cos += token * cos_stride
    sin += token * sin_stride
    await_previous(early)
    if part < q_parts:
        head = part * heads_wide + lanes
        _rotate(
            q + token * q_stride + head * q_head_stride,
            rotated + (token * heads + head) * head_dim,
            cos,
            sin,
            head < heads,
            head_dim,
            half,
            heads_wide,
            half_wide,
            rest_wide,
        )
    else:
        slot = tl.broadcast_to(tl.load(slot_mapping + token * slot_stride), (heads_wide, 1))
        in_cache = (slot >= 0) & (slot < num_slots)
        if part < q_parts + kv_parts:
            k_head = (part - q_parts) * heads_wide + lanes
            _rotate(
                k + token * k_stride + k_head * k_head_stride,
                key_cache + (slot * kv_heads + k_head) * head_dim,
                cos,
                sin,
                (k_head < kv_heads) & in_cache,
                head_dim,
                half,
                heads_wide,
                half_wide,
                rest_wide,
            )
        else:
            v_head = (part - q_parts - kv_parts) * heads_wide + lanes
            columns = tl.arange(0, dim_wide)[None, :]
            inside = (v_head < kv_heads) & (columns < head_dim)
            values = tl.load(v + token * v_stride + v_head * v_head_stride + columns, mask=inside)
            tl.store(value_cache + (slot * kv_heads + v_head) * head_dim + columns, values, mask=inside & in_cache)


@triton.jit
def _rotate(
    source,
    target,
    cos,
    sin,
    mask,
    head_dim: tl.constexpr,
    half: tl.constexpr,
    heads_wide: tl.constexpr,
    half_wide: tl.constexpr,
    rest_wide: tl.constexpr,
):
    """source, target: a pointer to each head. cos, sin: to the token's first. mask: the heads to turn."""
    columns = tl.arange(0, half_wide)[None, :]
    inside = mask & (columns < half)
    # Read anew for every head, from the cache, so that they lie in the threads that turn the head.
    angles = tl.broadcast_to(columns, (heads_wide, half_wide))
    first = tl.load(source + columns, mask=inside).to(tl.float32)
    second = tl.load(source + half + columns, mask=inside).to(tl.float32)
    first_cos = tl.load(cos + angles, mask=inside).to(tl.float32)
    first_sin = tl.load(sin + angles, mask=inside).to(tl.float32)
    second_cos = tl.load(cos + half + angles, mask=inside).to(tl.float32)
    second_sin = tl.load(sin + half + angles, mask=inside).to(tl.float32)
    kind: tl.constexpr = target.dtype.element_ty
    tl.store(target + columns, (first * first_cos - second * first_sin).to(kind), mask=inside)
    tl.store(target + half + columns, (second * second_cos + first * second_sin).to(kind), mask=inside)
    if head_dim > 2 * half:
        rest = 2 * half + tl.arange(0, rest_wide)[None, :]
        in_rest = mask & (rest < head_dim)
        tl.store(target + rest, tl.load(source + rest, mask=in_rest), mask=in_rest)
