"""The smallest set of the likeliest tokens whose mass reaches p; all others become -inf.

    token v stays  where  sum of w_u over u before v < p * sum of w,   w_v = exp(x_v - highest x)

u is before v where it is likelier, or as likely with a lower id. Weights are fixed-point integers: their sums do not
depend on the order of adding, so the set depends on nothing of the batch. A token below 2**-40 of the likeliest
one's probability weighs 0.

On a CPU `cut_top_p` finds the last token that stays without sorting, in a quarter of the time: by the mass of bins of
logits, then of the bins of the bin where p is reached, down to single values, and among equal values by counting. A
GPU sorts faster than it launches that many operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vlm.kernels.checks import check_dtype, check_shape

_ONE = 2.0**40
# (shift, width) of the digits of a distance from the highest logit: the 31 bits of a float that is not negative.
_DIGITS = ((20, 11), (9, 11), (0, 9))


def check_inputs(logits: Tensor, top_p: Tensor) -> None:
    op = "cut_top_p"
    check_shape(op, "logits", logits, (None, None))
    check_dtype(op, "logits", logits, torch.float32)
    check_shape(op, "top_p", top_p, (logits.shape[0],))
    check_dtype(op, "top_p", top_p, torch.float64)


def cut_top_p_reference(logits: Tensor, top_p: Tensor) -> Tensor:
    check_inputs(logits, top_p)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    weights = (ordered - ordered[:, :1]).exp_().mul_(_ONE).to(torch.int64)
    mass = weights.cumsum(dim=-1)
    wanted = top_p.unsqueeze(1) * mass[:, -1:].to(torch.float64)
    outside = (mass - weights).to(torch.float64) >= wanted
    return logits.masked_fill(torch.zeros_like(outside).scatter_(1, order, outside), -torch.inf)


def cut_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """logits: float32 [R, vocab], finite or -inf, with a finite one in each row. top_p: float64 [R], in (0, 1].

    A row that is not of such numbers gives a row of no meaning and changes no other.
    """
    cut = cut_top_p_by_bins if logits.device.type == "cpu" else cut_top_p_reference
    return cut(logits, top_p)


def cut_top_p_by_bins(logits: Tensor, top_p: Tensor) -> Tensor:
    check_inputs(logits, top_p)
    below = logits - logits.amax(dim=-1, keepdim=True)
    inside = below.exp().mul_(_ONE).to(torch.int64)
    keys = below.abs_().view(torch.int32).to(torch.int64)
    wanted = top_p.unsqueeze(1) * inside.sum(dim=-1, keepdim=True).to(torch.float64)
    last, mass_before = torch.zeros_like(keys[:, :1]), torch.zeros_like(keys[:, :1])
    for shift, width in _DIGITS:
        digit = (keys >> shift) & (2**width - 1)
        bins = keys.new_zeros((keys.shape[0], 2**width)).scatter_add_(1, digit, inside)
        before = mass_before + bins.cumsum(dim=-1) - bins
        # The last bin that begins below p; there is one where the row is of numbers.
        found = ((before.to(torch.float64) < wanted).sum(dim=-1, keepdim=True) - 1).clamp_(min=0)
        last, mass_before = (last << width) | found, before.gather(1, found)
        inside = torch.where(digit == found, inside, 0)
    is_last = keys == last
    mass_before = mass_before + (is_last.cumsum(dim=-1) - 1) * inside.amax(dim=-1, keepdim=True)
    stays = (keys < last) | (is_last & (mass_before.to(torch.float64) < wanted))
    return logits.masked_fill(~stays, -torch.inf)
