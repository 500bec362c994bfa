"""Penalties of tokens that a sequence holds already, in place on the rows that ask for them.

    repetition:            x_v <- x_v * r  where x_v < 0, else x_v / r,   v in the prompt or generated
    presence, frequency:   x_v <- x_v - (presence + frequency * count_v),  v generated count_v > 0 times

Repetition as in Keskar et al., "CTRL", 2019, and transformers' RepetitionPenaltyLogitsProcessor; the others are
OpenAI's. Tokens are counted on the device, which may know more of them than the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vlm.kernels.checks import check_dtype, check_shape


def penalise_repetition(
    logits: Tensor, token_ids: Tensor, *, rows: Tensor, slots: Tensor, ends: Tensor, longest: int, penalty: Tensor
) -> None:
    """logits: float32 [R, vocab]. token_ids: int64 [num_slots, max_model_len], those known in [0, vocab).

    Of each of P rows: rows, slots, int64 [P]; ends, int64 [P], known tokens, in 1 .. longest; penalty, float32 [P],
    above 0.
    """
    op = "penalise_repetition"
    _check(op, logits, rows=rows, slots=slots, ends=ends)
    check_shape(op, "penalty", penalty, tuple(rows.shape))
    seen, _ = _window(token_ids, slots, torch.zeros_like(ends), ends, width=longest)
    cells, factor = (rows.unsqueeze(1), seen), penalty.unsqueeze(1)
    values = logits[cells]
    penalised = torch.where(values < 0, values * factor, values / factor).clamp_(max=torch.finfo(torch.float32).max)
    # A token seen twice is written twice, with the same value.
    logits.index_put_(cells, penalised)


def penalise_generated(
    logits: Tensor,
    token_ids: Tensor,
    *,
    rows: Tensor,
    slots: Tensor,
    begins: Tensor,
    ends: Tensor,
    longest: int,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """As `penalise_repetition`, but for begins, int64 [P]: a row's tokens [begin, end) are the generated ones,
    1 .. longest of them; presence, frequency: float32 [P]."""
    op = "penalise_generated"
    _check(op, logits, rows=rows, slots=slots, begins=begins, ends=ends)
    for name, tensor in (("presence", presence), ("frequency", frequency)):
        check_shape(op, name, tensor, tuple(rows.shape))
    generated, is_token = _window(token_ids, slots, begins, ends, width=longest)
    counts = torch.zeros((rows.shape[0], logits.shape[1]), dtype=torch.int32, device=logits.device)
    counts.scatter_add_(1, generated, is_token.to(torch.int32))
    count = counts.gather(1, generated).to(torch.float32)
    cells = (rows.unsqueeze(1), generated)
    logits.index_put_(cells, logits[cells] - (presence.unsqueeze(1) + frequency.unsqueeze(1) * count))


def _window(token_ids: Tensor, slots: Tensor, begins: Tensor, ends: Tensor, *, width: int) -> tuple[Tensor, Tensor]:
    """Tokens [begin, end) of each slot, filled up to `width` with the last of them, and which are not filling."""
    place = begins.unsqueeze(1) + torch.arange(width, device=token_ids.device)
    is_token = place < ends.unsqueeze(1)
    return token_ids[slots.unsqueeze(1), torch.minimum(place, ends.unsqueeze(1) - 1)], is_token


def _check(op: str, logits: Tensor, **indices: Tensor) -> None:
    check_shape(op, "logits", logits, (None, None))
    check_dtype(op, "logits", logits, torch.float32)
    for name, tensor in indices.items():
        check_dtype(op, name, tensor, torch.int64)
        check_shape(op, name, tensor, tuple(indices["rows"].shape))
