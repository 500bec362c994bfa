"""Penalties of tokens that a sequence holds already, in place on the rows that ask for them.

    repetition:            x_v <- x_v * r  where x_v < 0, else x_v / r,   v in the prompt or generated
    presence, frequency:   x_v <- x_v - (presence + frequency * count_v),  v generated count_v > 0 times

Repetition as in Keskar et al., "CTRL", 2019, and transformers' RepetitionPenaltyLogitsProcessor; the others are
OpenAI's. Tokens are counted on the device, which may know more of them than the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dist_vlm.kernels.checks import check_dtype, check_shape
from dist_vlm.kernels.upload import upload

_FLOAT = torch.finfo(torch.float32)


class PenaltyRow(NamedTuple):
    """What is taken off one row of logits.

    row: of the logits; no two of a call have the same. slot: of the token ids.
    begin, end: the slot's tokens [0, end) are known, at least one, and those from begin on are generated.
    repetition: above 0, and 1 for none. presence, frequency: 0 for none.
    """

    row: int
    slot: int
    begin: int
    end: int
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0

    @property
    def penalises_generated(self) -> bool:
        return self.end > self.begin and bool(self.presence or self.frequency)


def check_inputs(logits: Tensor, token_ids: Tensor) -> None:
    op = "penalise"
    check_shape(op, "logits", logits, (None, None))
    check_dtype(op, "logits", logits, torch.float32)
    check_shape(op, "token_ids", token_ids, (None, None))
    check_dtype(op, "token_ids", token_ids, torch.int64)


def factor_of(repetition: float) -> float:
    """A repetition penalty as float32 has it, so that nothing is divided by zero."""
    return max(repetition, _FLOAT.tiny)


def penalise(logits: Tensor, token_ids: Tensor, rows: Sequence[PenaltyRow]) -> None:
    """logits: float32 [R, vocab]. token_ids: int64 [num_slots, max_model_len], those known in [0, vocab)."""
    check_inputs(logits, token_ids)
    if repeating := [row for row in rows if row.repetition != 1]:
        _penalise_repetition(logits, token_ids, repeating)
    if generating := [row for row in rows if row.penalises_generated]:
        _penalise_generated(logits, token_ids, generating)


def _penalise_repetition(logits: Tensor, token_ids: Tensor, rows: Sequence[PenaltyRow]) -> None:
    table = [[row.row, row.slot, row.end] for row in rows]
    indices, slots, ends = upload(table, torch.int64, logits.device).unbind(1)
    factor = upload([[factor_of(row.repetition)] for row in rows], torch.float32, logits.device)
    seen, _ = _window(token_ids, slots, torch.zeros_like(ends), ends, width=max(row.end for row in rows))
    cells = (indices.unsqueeze(1), seen)
    values = logits[cells]
    # A token seen twice is written twice, with the same value.
    logits.index_put_(cells, torch.where(values < 0, values * factor, values / factor).clamp_(max=_FLOAT.max))


def _penalise_generated(logits: Tensor, token_ids: Tensor, rows: Sequence[PenaltyRow]) -> None:
    table = [[row.row, row.slot, row.begin, row.end] for row in rows]
    indices, slots, begins, ends = upload(table, torch.int64, logits.device).unbind(1)
    penalties = [[row.presence, row.frequency] for row in rows]
    presence, frequency = upload(penalties, torch.float32, logits.device).unsqueeze(2).unbind(1)
    generated, is_token = _window(token_ids, slots, begins, ends, width=max(row.end - row.begin for row in rows))
    counts = torch.zeros((len(rows), logits.shape[1]), dtype=torch.int32, device=logits.device)
    counts.scatter_add_(1, generated, is_token.to(torch.int32))
    count = counts.gather(1, generated).to(torch.float32)
    cells = (indices.unsqueeze(1), generated)
    logits.index_put_(cells, logits[cells] - (presence + frequency * count))


def _window(token_ids: Tensor, slots: Tensor, begins: Tensor, ends: Tensor, *, width: int) -> tuple[Tensor, Tensor]:
    """Tokens [begin, end) of each slot, filled up to `width` with the last of them, and which are not filling."""
    place = begins.unsqueeze(1) + torch.arange(width, device=token_ids.device)
    is_token = place < ends.unsqueeze(1)
    return token_ids[slots.unsqueeze(1), torch.minimum(place, ends.unsqueeze(1) - 1)], is_token
