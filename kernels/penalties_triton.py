"""`kernels/penalties.py` in Triton: all penalties of a row in one pass, a program a row.

A program notes in counts of its own, one a token of the vocabulary, what each known token is: seen, and how often
generated. Then it goes over the tokens once more and takes the counts away. Whichever lane gets a count that is not
zero changes the logit, so that a token that is there several times is penalised once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_vlm.kernels.checks import check_rows
from dist_vlm.kernels.penalties import PenaltyRow, check_inputs, factor_of
from dist_vlm.kernels.upload import to_device

# Tokens looked at together.
_TILE = 1024
_SEEN = tl.constexpr(1 << 30)
_MAX = tl.constexpr(float(np.finfo(np.float32).max))


def penalise_triton(logits: Tensor, token_ids: Tensor, rows: Sequence[PenaltyRow]) -> None:
    """logits: float32 [R, vocab], token_ids: int64 [num_slots, max_model_len]; rows of both may be strided.

    Known tokens that are not in the vocabulary count for nothing.
    """
    check_inputs(logits, token_ids)
    check_rows("penalise", "logits", logits)
    check_rows("penalise", "token_ids", token_ids)
    if rows:
        launch(logits, token_ids, to_device(settings_of(rows), logits.device))


def settings_of(rows: Sequence[PenaltyRow]) -> np.ndarray:
    """int64 [7, P], one upload for all: row, slot, begin, end; and the bits of repetition, presence, frequency in
    float64."""
    *places, repetition, presence, frequency = zip(*rows, strict=True)
    numbers = np.array(([factor_of(value) for value in repetition], presence, frequency), dtype=np.float64)
    return np.concatenate((np.array(places, dtype=np.int64), numbers.view(np.int64)))


def launch(logits: Tensor, token_ids: Tensor, settings: Tensor) -> None:
    """`penalise_triton`, of settings that the device has."""
    num_rows, vocab = settings.shape[1], logits.shape[1]
    counts = torch.zeros((num_rows, vocab), dtype=torch.int32, device=logits.device)
    _penalise_kernel[(num_rows,)](
        logits, logits.stride(0), vocab, token_ids, token_ids.stride(0), settings, counts, tile=_TILE, num_warps=8
    )


@triton.jit(do_not_specialize=["stride", "vocab", "token_stride"])
def _penalise_kernel(logits, stride, vocab, token_ids, token_stride, settings, counts, tile: tl.constexpr):
    index, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    settings += index
    counts += index * vocab
    logits += tl.load(settings) * stride
    token_ids += tl.load(settings + num_rows) * token_stride
    begin, end = tl.load(settings + 2 * num_rows), tl.load(settings + 3 * num_rows)
    repetition = tl.load(settings + 4 * num_rows).to(tl.float64, bitcast=True).to(tl.float32)
    presence = tl.load(settings + 5 * num_rows).to(tl.float64, bitcast=True).to(tl.float32)
    frequency = tl.load(settings + 6 * num_rows).to(tl.float64, bitcast=True).to(tl.float32)
    lanes = tl.arange(0, tile)
    # Without a penalty of repetition the prompt does not count.
    first = tl.where(repetition != 1, 0, begin)
    most = tl.where(repetition != 1, _MAX, float("inf"))
    for start in range(first, end, tile):
        places = start + lanes
        ids, counting = _known(token_ids, places, end, vocab)
        tl.atomic_or(counts + ids, _SEEN, mask=counting, sem="relaxed")
        tl.atomic_add(counts + ids, 1, mask=counting & (places >= begin), sem="relaxed")
    tl.debug_barrier()  # all is noted
    for start in range(first, end, tile):
        ids, counting = _known(token_ids, start + lanes, end, vocab)
        count = tl.atomic_xchg(counts + ids, 0, mask=counting, sem="relaxed")
        is_first = counting & (count != 0)
        x = tl.load(logits + ids, mask=is_first, other=0.0)
        repeated = tl.where(x < 0, x * repetition, tl.div_rn(x, repetition))
        x = tl.where(repeated > most, most, repeated)
        generated = (count & (_SEEN - 1)).to(tl.float32)
        x = tl.where(generated > 0, x - (presence + frequency * generated), x)
        tl.store(logits + ids, x, mask=is_first)


@triton.jit
def _known(token_ids, places, end, vocab):
    """The tokens at some places, and which of them are known ones of the vocabulary."""
    inside = places < end
    ids = tl.load(token_ids + places, mask=inside, other=0)
    return ids, inside & (ids >= 0) & (ids < vocab)
