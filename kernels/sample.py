"""Choice of the next token from logits.

Greedy: the highest logit, the lowest token id among equals. Otherwise the logits are divided by the temperature,
cut to the top_k highest (all that equal the lowest kept stay) and then to the smallest set of highest
probabilities whose mass reaches top_p, and a token is drawn by the Gumbel-max rule: the argmax of

    logit_v - log(-log(u_v)),  u_v uniform, counter-based by (seed, sample index, position, v)

which draws v with probability softmax(logits)_v (Gumbel 1954; Maddison et al., "A* Sampling", 2014). The noise
depends on nothing but the request and the position, so neither does the token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vlm.kernels.philox import uniform_noise


def greedy(logits: Tensor) -> Tensor:
    """[rows, vocab] -> int64 [rows]. A row with NaN has no highest logit; its token is some id of the vocabulary."""
    best = logits.max(dim=-1, keepdim=True).values
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(logits == best, ids, logits.shape[-1] - 1).min(dim=-1).values


def draw(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    sample_index: Tensor,
    position: Tensor,
) -> Tensor:
    """Draws one token a row.

    logits: float32 [rows, vocab]. temperature, top_p: float32 [rows], temperature > 0. top_k: int64 [rows], 0 for
    all. seed, sample_index, position: int64 [rows]. Returns int64 [rows].
    """
    scaled = logits / temperature.unsqueeze(1)
    scaled = cut_top_p(cut_top_k(scaled, top_k), top_p)
    noise = uniform_noise(seed, sample_index, position, logits.shape[-1])
    return greedy(scaled - torch.log(-torch.log(noise)))


def cut_top_k(logits: Tensor, top_k: Tensor) -> Tensor:
    """-inf for all below the k-th highest of a row; rows with k = 0 stay whole."""
    vocab = logits.shape[-1]
    if not bool(top_k.any()):
        return logits
    count = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)
    most = int(count[top_k > 0].max())
    highest = logits.topk(most, dim=-1).values
    threshold = highest.gather(1, (count.clamp(max=most) - 1).unsqueeze(1))
    threshold = torch.where((top_k > 0).unsqueeze(1), threshold, -torch.inf)
    return logits.masked_fill(logits < threshold, -torch.inf)


def cut_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """-inf outside the smallest set of highest probabilities with mass >= top_p; at least one stays."""
    if bool((top_p >= 1.0).all()):
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    outside = (mass_before >= top_p.unsqueeze(1)) & (top_p < 1.0).unsqueeze(1)
    outside[:, 0] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)
