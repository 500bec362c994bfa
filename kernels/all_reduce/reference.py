"""What the collectives compute, from all ranks' parts at one place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def all_reduce_reference(parts: Sequence[Tensor]) -> Tensor:
    """The ranks' parts, equally shaped, added up in float32 in rank order and rounded once to their dtype."""
    total = torch.zeros(parts[0].shape, dtype=torch.float32, device=parts[0].device)
    for part in parts:
        total = total + part.float()
    return total.to(parts[0].dtype)


def all_gather_reference(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts))
