"""The tensors of one step. `pack` alone makes them; they are an argument of every forward, never ambient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """T tokens of S sequences, a sequence's tokens adjacent and in ascending position.

    token_ids: int64 [T].
    positions: int64 [axes, T]: positions for the rotary embedding; one axis unless the model has more.
    rotary_lengths: int64 [T]: the sequence length each token's rotary frequencies are computed for, max(prompt
        length, position + 1); only rotary types whose frequencies depend on the length read it.
    slot_mapping: int64 [T]: where each token's key and value go: block id * block_size + offset.
    query_starts: int64 [S + 1]: the tokens of sequence s are [query_starts[s], query_starts[s + 1]).
    context_lens: int64 [S]: keys that the last token of sequence s sees, itself included.
    block_tables: int64 [S, blocks]: block ids of each sequence, zero past its end.
    logits_rows: int64 [R]: tokens whose logits are wanted; None where all are, in order.
    feature_rows: int64 [T]: the row of image_features that is the token's embedding, -1 where it is the token's own;
        None where every token has its own.
    image_features: [I, hidden_size], the model's dtype.
    bounds: of each sequence its first token, end token and context, on the host; None where only the device knows.
    decode_slots: int64 [S], where each sequence has one token, and S no bounds: rows of `block_tables`, which are
        then those of all slots. A context of 0 means that the row is computed for nothing.
    tiles: int32 [P, 4], where the sequences are pieces of slots that were cut on the host, and S no bounds; see
        `RecordedOps.cut_tiles`.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    rotary_lengths: torch.Tensor
    slot_mapping: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    logits_rows: torch.Tensor | None
    feature_rows: torch.Tensor | None
    image_features: torch.Tensor
    bounds: Sequence[tuple[int, int, int]] | None
    decode_slots: torch.Tensor | None = None
    tiles: torch.Tensor | None = None
