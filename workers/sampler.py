"""Sampling of a step's new tokens, the same on every rank: all hold the same gathered logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_vlm.kernels import sample
from dist_vlm.workers.plan import SamplingRow


def sample_tokens(logits: Tensor, rows: Sequence[SamplingRow], positions: Sequence[int]) -> Tensor:
    """Chooses a token for each row of float32 logits [rows, vocab]; returns int64 [rows].

    positions: where in its sequence each token will stand; with the row's seed it keys the noise.
    """
    tokens = sample.greedy(logits)
    drawn = [index for index, row in enumerate(rows) if row.temperature > 0]
    if not drawn:
        return tokens
    chosen = [rows[index] for index in drawn]

    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=logits.device)

    def floats(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)

    index = integers(drawn)
    tokens[index] = sample.draw(
        logits[index],
        temperature=floats([row.temperature for row in chosen]),
        top_k=integers([row.top_k for row in chosen]),
        top_p=floats([row.top_p for row in chosen]),
        seed=integers([row.seed for row in chosen]),
        sample_index=integers([row.sample_index for row in chosen]),
        position=integers([positions[i] for i in drawn]),
    )
    return tokens
