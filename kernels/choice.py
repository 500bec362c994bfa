"""Which implementation of each op a rank runs: chosen once, at start, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dist_vlm.kernels import paged_attention, reduce_add_norm, rotary, silu_mul, write_kv

Op = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class OpSet:
    """One implementation of each op; the op's module documents its arguments."""

    paged_attention: Callable[..., Tensor]
    write_kv: Callable[..., None]
    apply_rotary: Callable[..., tuple[Tensor, Tensor]]
    silu_mul: Callable[..., Tensor]
    reduce_add_norm: Callable[..., tuple[Tensor, Tensor]]

    @property
    def names(self) -> dict[str, str]:
        """Op -> the function that implements it, for the log."""
        return {field.name: getattr(self, field.name).__name__ for field in dataclasses.fields(self)}
