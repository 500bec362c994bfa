"""What a decode step computes of its rows, from what the device itself keeps of the slots.

Row i decodes `slots[i]` at `positions[i]`; a negative position means that nothing is to be computed:

    token[i]   = token_ids[slot, position]                                        (position 0 where it is negative)
    mapping[i] = block_tables[slot, position // block_size] * block_size + position % block_size,  or -1
    context[i] = position + 1,  or 0

so that a step needs of the host a slot and a position a row, and no more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_vlm.kernels.checks import check_dtype, check_rows, check_shape

_ROWS = 64


def check_inputs(slots: Tensor, positions: Tensor, token_ids: Tensor, block_tables: Tensor) -> None:
    op = "decode_inputs"
    check_shape(op, "positions", positions, (slots.shape[0],))
    check_shape(op, "token_ids", token_ids, (None, None))
    check_shape(op, "block_tables", block_tables, (token_ids.shape[0], None))
    for name, tensor in (("slots", slots), ("positions", positions), ("token_ids", token_ids)):
        check_dtype(op, name, tensor, torch.int64)
        check_rows(op, name, tensor)
    check_dtype(op, "block_tables", block_tables, torch.int32)


def decode_inputs_reference(
    slots: Tensor, positions: Tensor, token_ids: Tensor, block_tables: Tensor, *, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    check_inputs(slots, positions, token_ids, block_tables)
    known = positions.clamp(min=0)
    mapping = block_tables[slots, known // block_size] * block_size + known % block_size
    return token_ids[slots, known], torch.where(positions < 0, -1, mapping), (positions + 1).clamp(min=0)


def decode_inputs_triton(
    slots: Tensor, positions: Tensor, token_ids: Tensor, block_tables: Tensor, *, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(token, mapping, context), int64 [N] each.

    slots, positions: int64 [N]. token_ids: int64 [slots, positions]. block_tables: int32 [slots, blocks].
    """
    check_inputs(slots, positions, token_ids, block_tables)
    num_rows = slots.shape[0]
    token, mapping, context = torch.empty((3, num_rows), dtype=torch.int64, device=slots.device)
    _decode_inputs_kernel[(triton.cdiv(num_rows, _ROWS),)](
        slots,
        positions,
        token_ids,
        token_ids.stride(0),
        block_tables,
        block_tables.stride(0),
        token,
        mapping,
        context,
        num_rows,
        block_size=block_size,
        rows=_ROWS,
        num_warps=2,
    )
    return token, mapping, context


# Read and written a number at a time: a kernel for every batch, however its rows lie.
@triton.jit(
    do_not_specialize=[
        "slots",
        "positions",
        "token_ids",
        "token_stride",
        "block_tables",
        "table_stride",
        "token",
        "mapping",
        "context",
        "num_rows",
    ]
)
def _decode_inputs_kernel(
    slots,
    positions,
    token_ids,
    token_stride,
    block_tables,
    table_stride,
    token,
    mapping,
    context,
    num_rows,
    block_size: tl.constexpr,
    rows: tl.constexpr,
):
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    exists = row < num_rows
    slot = tl.load(slots + row, mask=exists, other=0)
    position = tl.load(positions + row, mask=exists, other=-1)
    known = tl.maximum(position, 0)
    known_token = tl.load(token_ids + slot * token_stride + known, mask=exists, other=0)
    block = tl.load(block_tables + slot * table_stride + known // block_size, mask=exists, other=0).to(tl.int64)
    place = tl.where(position < 0, -1, block * block_size + known % block_size)
    tl.store(token + row, known_token, mask=exists)
    tl.store(mapping + row, place, mask=exists)
    tl.store(context + row, tl.maximum(position + 1, 0), mask=exists)
