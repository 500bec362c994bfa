"""`silu_mul` in Triton: a program has a part of one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_vlm.kernels.checks import check_float
from dist_vlm.kernels.early_start_triton import await_previous, launch_early, start_next
from dist_vlm.kernels.silu_mul import check_inputs

# With 4 warps, 16 bytes of bfloat16 a thread of each half.
_TILE = 1024


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    """Computed in float32 and rounded once."""
    check_inputs(gate_up)
    check_float("silu_mul", "gate_up", gate_up)
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        programs = num_tokens * triton.cdiv(size, _TILE)
        _silu_mul_kernel[(programs,)](
            gate_up, out, gate_up.stride(0), size=size, tile=_TILE, num_warps=4, **launch_early()
        )
    return out


@triton.jit
def _silu_mul_kernel(gate_up, out, stride, size: tl.constexpr, tile: tl.constexpr, early: tl.constexpr = False):
    start_next(early)
    parts: tl.constexpr = (size + tile - 1) // tile
    row = (tl.program_id(0) // parts).to(tl.int64)
    columns = (tl.program_id(0) % parts) * tile + tl.arange(0, tile)
    inside = columns < size
    source = gate_up + row * stride + columns
    await_previous(early)
    gate = tl.load(source, mask=inside).to(tl.float32)
    up = tl.load(source + size, mask=inside).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * size + columns, result.to(out.dtype.element_ty), mask=inside)
