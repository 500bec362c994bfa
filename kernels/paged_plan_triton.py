"""What the Triton kernels of paged attention are told of a batch: which sequences have one token, and the tiles that
those with several are cut into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_vlm.kernels.paged_attention import Bounds, check_batch, sequence_bounds
from dist_vlm.kernels.upload import to_device

# Queries of a tile.
TILE_ROWS = 64
# Arguments of which no kernel is compiled anew: they change from call to call and are read a number at a time. The
# others' multiples of 16 tell a kernel how much it may read at once.
VARYING = (
    "tokens",
    "sequences",
    "contexts",
    "block_tables",
    "tiles",
    "table_stride",
    "token_step",
    "sequence_step",
    "context_step",
    "parts",
    "slot_mapping",
    "slot_step",
    "num_slots",
)


@dataclass(frozen=True, slots=True)
class DecodeSet:
    """N sequences with one token each.

    tokens: int [N], the row of q of each; None where they are the first N rows, in order.
    sequences: int [N], the row of the block table of each. contexts: int [N], 0 for a row that is computed for nothing.
    """

    tokens: Tensor | None
    sequences: Tensor
    contexts: Tensor


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """tiles: int32 [P, 4], of each the first row of q, how many, the row of the block table, and the position of the
    first; None without a prefill."""

    decodes: DecodeSet | None
    tiles: Tensor | None
    block_tables: Tensor
    block_size: int
    num_tokens: int


def plan_decode_triton(slots: Tensor, context_lens: Tensor, block_tables: Tensor, *, block_size: int) -> TritonPlan:
    """For a batch of single tokens, row i of q that of block table `slots[i]`. Reads nothing on the host.

    slots, context_lens: int [N]; a context of 0 gives a row of zeros. block_tables: int [slots, blocks].
    """
    return TritonPlan(DecodeSet(None, slots, context_lens), None, block_tables, block_size, slots.shape[0])


def plan_tiles_triton(tiles: Tensor, num_tokens: int, block_tables: Tensor, *, block_size: int) -> TritonPlan:
    """For tiles of pieces of slots, some of which may have no rows. Reads nothing on the host.

    tiles: int32 [P, 4], see `cut_tiles`. block_tables: int [slots, blocks].
    """
    return TritonPlan(None, tiles, block_tables, block_size, num_tokens)


def plan_attention_triton(
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    *,
    block_size: int,
    position_bytes: int,
    bounds: Bounds | None = None,
) -> TritonPlan:
    """Prepares the arguments that every layer shares; waits for the device where `bounds` are not given."""
    del position_bytes
    check_batch(query_starts, context_lens, block_tables, block_size)
    bounds = bounds or sequence_bounds(query_starts, context_lens, block_tables.shape[1] * block_size)
    singles, pieces = [], []
    for sequence, (start, end, context) in enumerate(bounds):
        if end - start == 1:
            singles.append((start, sequence, context))
        else:
            pieces.append((start, end, context, sequence))
    tiles = cut_tiles(pieces)
    device = block_tables.device
    decodes = None
    if singles:
        tokens, sequences, contexts = _upload(singles, 3, device).unbind(1)
        decodes = DecodeSet(tokens, sequences, contexts)
    return TritonPlan(
        decodes,
        _upload(tiles, 4, device) if tiles else None,
        block_tables,
        block_size,
        bounds[-1][1] if bounds else 0,
    )


def cut_tiles(pieces: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """See `TritonPlan.tiles`. pieces: first token, end token, context and row of the block table of each."""
    tiles = [
        (row, min(TILE_ROWS, end - row), sequence, context - end + row)
        for start, end, context, sequence in pieces
        for row in range(start, end, TILE_ROWS)
    ]
    tiles.sort(key=lambda tile: -tile[3])  # the longest first, so that none of them is left for the end
    return tiles


def _upload(rows: Sequence[tuple[int, ...]], width: int, device: torch.device) -> Tensor:
    return to_device(np.array(rows, dtype=np.int32).reshape(-1, width), device)
