"""Log probabilities of given tokens, their ranks, and the likeliest tokens beside them.

logprob = log(softmax(logits)_token), rank = 1 + how many logits are higher than the token's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dist_vlm.kernels.checks import check_dtype, check_shape

# Logits looked at together: bounds what is held beside them.
_PART_LOGITS = 2**22


class LogprobTensors(NamedTuple):
    """logprob: float32 [R]. rank: int64 [R]. top_ids: int64 [R, K], top_logprobs: float32 [R, K], in descending
    order, the lower id first among equals."""

    logprob: Tensor
    rank: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def compute_logprobs(logits: Tensor, token_ids: Tensor, *, num_top: int) -> LogprobTensors:
    """logits: float32 [R, vocab]. token_ids: int64 [R], in range. K is num_top, or vocab where that is less."""
    op = "compute_logprobs"
    check_shape(op, "token_ids", token_ids, (logits.shape[0],))
    check_dtype(op, "token_ids", token_ids, torch.int64)
    check_dtype(op, "logits", logits, torch.float32)
    vocab = logits.shape[1]
    size = max(1, _PART_LOGITS // vocab)
    parts = [
        _compute_part(part, ids.unsqueeze(1), num_top=min(num_top, vocab))
        for part, ids in zip(logits.split(size), token_ids.split(size), strict=True)
    ]
    return parts[0] if len(parts) == 1 else LogprobTensors(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _compute_part(logits: Tensor, token_ids: Tensor, *, num_top: int) -> LogprobTensors:
    logprobs = logits.log_softmax(dim=-1)
    if num_top == 0:
        top_ids = token_ids.new_empty((logits.shape[0], 0))
    else:
        top_ids = _ordered_keys(logits).topk(num_top, dim=-1).indices
    return LogprobTensors(
        logprob=logprobs.gather(1, token_ids).squeeze(1),
        rank=(logits > logits.gather(1, token_ids)).sum(dim=-1) + 1,
        top_ids=top_ids,
        top_logprobs=logprobs.gather(1, top_ids),
    )


def _ordered_keys(logits: Tensor) -> Tensor:
    """int64 keys, no two of a row equal, in the order of the logits and then of descending ids.

    The bits of a float, read as an integer, are ordered as the floats are where these are positive and the other
    way round where negative.
    """
    bits = (logits + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0, which it equals
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = torch.arange(logits.shape[1], device=logits.device)
    return (ordered.to(torch.int64) << 32) | (logits.shape[1] - 1 - ids)
