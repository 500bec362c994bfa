"""The highest logit of each row, in Triton, and whether all logits of the row are finite.

    tokens[r] = the lowest v with logits[r, v] = max over u of logits[r, u]

logits: float32, bfloat16 or float16 [R, vocab], rows may be strided -> tokens: int64 [R], finite: bool [R].
NaN is never the highest; a row of NaN alone gives token 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_vlm.kernels.checks import check_float, check_rows, check_shape
from dist_vlm.kernels.early_start_triton import await_previous, launch_early, start_next

# Logits looked at together: with 16 warps, 64 bytes of float32 a thread under way.
_TILE = 8192
_THREAD_NUMBERS = 16


def check_inputs(logits: Tensor) -> None:
    op = "greedy"
    check_shape(op, "logits", logits, (None, None))
    check_float(op, "logits", logits)
    check_rows(op, "logits", logits)
    if logits.shape[1] == 0:
        raise ValueError(f"{op}: logits has shape {list(logits.shape)}, must have at least one column")


def greedy_triton(logits: Tensor) -> tuple[Tensor, Tensor]:
    """One pass over the logits, a program a row."""
    check_inputs(logits)
    num_rows, vocab = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    finite = torch.empty(num_rows, dtype=torch.bool, device=logits.device)
    if num_rows:
        tile = min(_TILE, triton.next_power_of_2(vocab))
        warps = max(1, tile // (32 * _THREAD_NUMBERS))
        _greedy_kernel[(num_rows,)](
            logits, tokens, finite, logits.stride(0), vocab=vocab, tile=tile, num_warps=warps, **launch_early()
        )
    return tokens, finite


@triton.jit
def _greedy_kernel(
    logits, tokens, finite, stride, vocab: tl.constexpr, tile: tl.constexpr, early: tl.constexpr = False
):
    start_next(early)
    await_previous(early)
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, tile)
    # Of each lane: its highest, the first place of it, and whether a number was not finite.
    best = tl.full((tile,), float("-inf"), tl.float32)
    place = lanes
    bad = tl.full((tile,), 0, tl.int32)
    for start in range(0, vocab, tile):
        columns = start + lanes
        x = tl.load(logits + row * stride + columns, mask=columns < vocab, other=0.0).to(tl.float32)
        bad = tl.where(tl.abs(x) < float("inf"), bad, 1)
        higher = (x > best) & (columns < vocab)
        best = tl.where(higher, x, best)
        place = tl.where(higher, columns, place)
    highest = tl.max(best, axis=0)
    tl.store(tokens + row, tl.min(tl.where(best == highest, place, vocab), axis=0).to(tl.int64))
    tl.store(finite + row, tl.max(bad, axis=0) == 0)
