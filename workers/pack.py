"""A plan becomes a batch: laid out on the host, then put on the device."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dist_vlm.kernels.upload import to_device
from dist_vlm.workers.batch import Batch
from dist_vlm.workers.plan import Slice
from dist_vlm.workers.slots import SlotTable

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows of the logits that tell of prompt tokens: those at the positions [start, start + count) of a slot.

    num_top: alternatives wanted with each.
    """

    slot: int
    start: int
    count: int
    num_top: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A batch on the host, see `Batch`; whose its logits are: first a row for each slice that samples, in their order,
    then `prompt_rows`.

    slots: int64 [T], the slot of each token. image_features: [rows, hidden_size] each, of the model's dtype, on its
        device: those that `feature_rows` counts, one after another.
    unpackable: slots whose slice raised. Their tokens are computed without images and are to be thrown away, so that
        this rank keeps step with the others, which may have met no error.
    """

    slots: np.ndarray
    positions: np.ndarray
    rotary_lengths: np.ndarray
    slot_mapping: np.ndarray
    bounds: list[tuple[int, int, int]]
    logits_rows: list[int]
    feature_rows: np.ndarray | None
    image_features: list[torch.Tensor]
    prompt_rows: tuple[PromptRows, ...]
    unpackable: tuple[int, ...] = ()


def lay_out(slices: Sequence[Slice], *, slots: SlotTable, features: Mapping[str, torch.Tensor], width: int) -> Layout:
    """Builds the batch of a step. An error of a slice is that slice's alone: see `Layout.unpackable`.

    slices: at least one; their blocks are in the slot table already.
    features: content key -> [rows, hidden_size] of every image that a slice overlaps. width: hidden_size.
    """
    try:
        return _lay_out(slices, slots, features, width)
    except Exception:
        _log.exception("a step could not be packed; looking for the slot")
    guilty = tuple(piece.slot for piece in slices if not _is_packable(piece, slots, features, width))
    return dataclasses.replace(_lay_out(slices, slots, features, width, without_images=guilty), unpackable=guilty)


def _is_packable(piece: Slice, slots: SlotTable, features: Mapping[str, torch.Tensor], width: int) -> bool:
    try:
        _lay_out([piece], slots, features, width)
    except Exception:
        _log.exception("slot %d cannot be packed", piece.slot)
        return False
    return True


def _lay_out(
    slices: Sequence[Slice],
    slots: SlotTable,
    features: Mapping[str, torch.Tensor],
    width: int,
    without_images: Collection[int] = (),
) -> Layout:
    counts = np.array([piece.count for piece in slices])
    starts = np.concatenate(([0], np.cumsum(counts)))
    slot_of_token = np.repeat([piece.slot for piece in slices], counts)
    positions = np.concatenate([np.arange(piece.start, piece.start + piece.count) for piece in slices])
    num_prompt_tokens = np.repeat([slots.sequence(piece.slot).num_prompt_tokens for piece in slices], counts)
    block_of_token = slots.block_ids[slot_of_token, positions // slots.block_size]
    feature_rows, image_features = _feature_rows(slices, starts, slots, features, without_images, width)
    logits_rows = [int(start) + piece.count - 1 for start, piece in zip(starts, slices, strict=False) if piece.sample]
    prompt_rows = _prompt_rows(slices, slots)
    first_row = {piece.slot: int(start) - piece.start for start, piece in zip(starts, slices, strict=False)}
    for rows in prompt_rows:
        # The logits at a position tell of the token after it.
        low = first_row[rows.slot] + rows.start - 1
        logits_rows.extend(range(low, low + rows.count))
    return Layout(
        slots=slot_of_token,
        positions=positions,
        rotary_lengths=np.maximum(num_prompt_tokens, positions + 1),
        slot_mapping=block_of_token * slots.block_size + positions % slots.block_size,
        bounds=[
            (start, start + piece.count, piece.start + piece.count)
            for start, piece in zip(starts.tolist(), slices, strict=False)
        ],
        logits_rows=logits_rows,
        feature_rows=feature_rows,
        image_features=image_features,
        prompt_rows=prompt_rows,
    )


def pack(layout: Layout, slices: Sequence[Slice], *, slots: SlotTable, empty_features: torch.Tensor) -> Batch:
    """The batch's tensors, enqueued. slices: those that were laid out.

    empty_features: [0, hidden_size] of the model's dtype, on its device.
    """
    device = slots.token_ids.device

    def put(array: np.ndarray | list[int] | list[np.ndarray]) -> torch.Tensor:
        return to_device(np.array(array, dtype=np.int64), device)

    of_tokens = [layout.slots, layout.positions, layout.rotary_lengths, layout.slot_mapping]
    if layout.feature_rows is not None:
        of_tokens.append(layout.feature_rows)
    token_slots, positions, rotary_lengths, slot_mapping, *feature_rows = put(of_tokens)  # one copy for all
    context_lens = np.array([context for *_, context in layout.bounds])
    return Batch(
        token_ids=slots.token_ids[token_slots, positions],
        positions=positions.unsqueeze(0),
        rotary_lengths=rotary_lengths,
        slot_mapping=slot_mapping,
        query_starts=put([0, *(end for _, end, _ in layout.bounds)]),
        context_lens=put(context_lens),
        block_tables=put(_block_tables(slices, context_lens, slots)),
        logits_rows=put(layout.logits_rows),
        feature_rows=feature_rows[0] if feature_rows else None,
        image_features=torch.cat(layout.image_features) if layout.image_features else empty_features,
        bounds=layout.bounds,
    )


def _prompt_rows(slices: Sequence[Slice], slots: SlotTable) -> tuple[PromptRows, ...]:
    found = []
    for piece in slices:
        sequence = slots.sequence(piece.slot)
        num_top = sequence.sampling.prompt_logprobs
        count = min(piece.start + piece.count + 1, sequence.num_prompt_tokens) - (piece.start + 1)
        if num_top is not None and count > 0:
            found.append(PromptRows(piece.slot, piece.start + 1, count, num_top))
    return tuple(found)


def _block_tables(slices: Sequence[Slice], context_lens: np.ndarray, slots: SlotTable) -> np.ndarray:
    num_blocks = -(-context_lens // slots.block_size)
    tables = slots.block_ids[[piece.slot for piece in slices], : num_blocks.max()]
    used: np.ndarray = np.arange(tables.shape[1]) < num_blocks[:, None]
    return np.where(used, tables, 0)


def _feature_rows(
    slices: Sequence[Slice],
    starts: np.ndarray,
    slots: SlotTable,
    features: Mapping[str, torch.Tensor],
    without_images: Collection[int],
    width: int,
) -> tuple[np.ndarray | None, list[torch.Tensor]]:
    """`Batch.feature_rows`, and the features it counts, span by span."""
    rows: np.ndarray = np.full(int(starts[-1]), -1)
    parts: list[torch.Tensor] = []
    num_rows = 0
    for batch_start, piece in zip(starts, slices, strict=False):
        if piece.slot in without_images:
            continue
        end = piece.start + piece.count
        for span in slots.sequence(piece.slot).images:
            low, high = max(span.start, piece.start), min(span.end, end)
            if low < high:
                if features[span.image].shape != (span.count, width):
                    shape = list(features[span.image].shape)
                    raise ValueError(f"image {span.image} has features of shape {shape}, not [{span.count}, {width}]")
                shift = int(batch_start) - piece.start
                rows[shift + low : shift + high] = np.arange(num_rows, num_rows + high - low)
                num_rows += high - low
                parts.append(features[span.image][low - span.start : high - span.start])
    return rows if parts else None, parts
