"""The only place where a plan becomes tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from dist_vlm.workers.batch import Batch
from dist_vlm.workers.plan import Slice
from dist_vlm.workers.slots import SlotTable


def pack(
    slices: Sequence[Slice], *, slots: SlotTable, features: Mapping[str, torch.Tensor], empty_features: torch.Tensor
) -> Batch:
    """Builds the batch of a step.

    slices: at least one; their blocks are in the slot table already.
    features: content key -> [rows, hidden_size] of every image that a slice overlaps.
    empty_features: [0, hidden_size] of the model's dtype, on its device.
    """
    device = slots.token_ids.device
    counts = np.array([piece.count for piece in slices])
    starts = np.concatenate(([0], np.cumsum(counts)))
    slot_of_token = np.repeat([piece.slot for piece in slices], counts)
    positions = np.concatenate([np.arange(piece.start, piece.start + piece.count) for piece in slices])
    context_lens = np.array([piece.start + piece.count for piece in slices])
    num_prompt_tokens = np.repeat([slots.sequence(piece.slot).num_prompt_tokens for piece in slices], counts)
    block_of_token = slots.block_ids[slot_of_token, positions // slots.block_size]
    slot_mapping = block_of_token * slots.block_size + positions % slots.block_size
    image_rows, image_features = _image_rows(slices, starts, slots, features)
    logits_rows = [start + piece.count - 1 for start, piece in zip(starts, slices, strict=False) if piece.sample]

    def put(array: np.ndarray | list[int]) -> torch.Tensor:
        return torch.as_tensor(np.asarray(array, dtype=np.int64)).to(device, non_blocking=True)

    device_positions = put(positions)
    return Batch(
        token_ids=slots.token_ids[put(slot_of_token), device_positions],
        positions=device_positions.unsqueeze(0),
        rotary_lengths=put(np.maximum(num_prompt_tokens, positions + 1)),
        slot_mapping=put(slot_mapping),
        query_starts=put(starts),
        context_lens=put(context_lens),
        block_tables=put(_block_tables(slices, context_lens, slots)),
        logits_rows=put(logits_rows),
        image_rows=put(image_rows),
        image_features=torch.cat(image_features) if image_features else empty_features,
        max_query_len=int(counts.max()),
        max_context_len=int(context_lens.max()),
    )


def _block_tables(slices: Sequence[Slice], context_lens: np.ndarray, slots: SlotTable) -> np.ndarray:
    num_blocks = -(-context_lens // slots.block_size)
    tables = slots.block_ids[[piece.slot for piece in slices], : num_blocks.max()]
    used: np.ndarray = np.arange(tables.shape[1]) < num_blocks[:, None]
    return np.where(used, tables, 0)


def _image_rows(
    slices: Sequence[Slice], starts: np.ndarray, slots: SlotTable, features: Mapping[str, torch.Tensor]
) -> tuple[list[int], list[torch.Tensor]]:
    """Rows of the batch that image features fill, and those features, span by span."""
    rows: list[int] = []
    parts: list[torch.Tensor] = []
    for batch_start, piece in zip(starts, slices, strict=False):
        end = piece.start + piece.count
        for span in slots.sequence(piece.slot).images:
            low, high = max(span.start, piece.start), min(span.end, end)
            if low < high:
                shift = int(batch_start) - piece.start
                rows.extend(range(shift + low, shift + high))
                parts.append(features[span.image][low - span.start : high - span.start])
    return rows, parts
