"""Tokens that must not be chosen: their logits become -inf, in place.

`mask_tokens` masks tokens whatever came before them. `mask_completions` masks the last token of each word whose
other tokens are the latest of the row's sequence, prompt included: with a word (w_1 .. w_m),

    logits[row, w_m] = -inf  where  tokens[slot, end - m + 1 + i] = w_(i + 1) for i in 0 .. m - 2

as transformers' NoBadWordsLogitsProcessor does. Tokens are compared on the device, which may know more than the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vlm.kernels.checks import check_dtype, check_shape


def mask_tokens(logits: Tensor, *, rows: Tensor, ids: Tensor) -> None:
    """logits: float32 [R, vocab]. rows, ids: int64 [N], in range; a pair may come twice."""
    check_shape("mask_tokens", "logits", logits, (None, None))
    check_shape("mask_tokens", "ids", ids, tuple(rows.shape))
    logits.index_put_((rows, ids), torch.full((), -torch.inf, device=logits.device))


def mask_completions(
    logits: Tensor,
    token_ids: Tensor,
    *,
    rows: Tensor,
    slots: Tensor,
    ends: Tensor,
    words: Tensor,
    lengths: Tensor,
) -> None:
    """logits: float32 [R, vocab]. token_ids: int64 [num_slots, max_model_len].

    Of each of N words, int64 [N]: rows, the row it is banned in; slots, that row's slot; ends, how many tokens the
    slot holds; lengths, the word's tokens, 2 .. ends + 1. words: int64 [N, longest length], ids in range, padded at
    the end with any.
    """
    op, num_words = "mask_completions", rows.shape[0]
    check_shape(op, "words", words, (num_words, None))
    for name, tensor in (("slots", slots), ("ends", ends), ("lengths", lengths)):
        check_shape(op, name, tensor, (num_words,))
        check_dtype(op, name, tensor, torch.int64)
    before = (lengths - 1).unsqueeze(1)
    place = torch.arange(words.shape[1], device=logits.device)
    is_prefix = place < before
    latest = ends.unsqueeze(1) - before + place
    known = token_ids[slots.unsqueeze(1), torch.where(is_prefix, latest, 0)]
    is_met = ((known == words) | ~is_prefix).all(dim=1)
    last = words.gather(1, before).squeeze(1)
    # Two words may end in the same token: -inf or 0 is added, in any order.
    logits.index_put_((rows, last), torch.where(is_met, -torch.inf, 0.0), accumulate=True)
