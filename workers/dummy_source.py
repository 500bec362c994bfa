"""Random weights that need no files, for benchmarks and tests.

A value depends on the seed, the tensor's name and its own row and column, and on nothing else: every world size
holds shards of one model, and the CPU and the GPU hold the same one.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from dist_vlm.workers.weights import WeightSource

CHUNK_VALUES = {"cpu": 2**18, "cuda": 2**24}
# Odd constants that spread rows and columns: the golden ratio and the square root of 3, in 32 bits.
ROW_STEP, COLUMN_STEP = 0x9E3779B1, 0xBB67AE85


class DummySource(WeightSource):
    """Uniform values scaled so that a forward keeps its magnitude.

    A matrix has the standard deviation 1 / sqrt(fan-in), an embedding 1, a norm's weight lies in [0.9, 1.1], any
    other vector in [-0.02, 0.02].
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def has(self, name: str) -> bool:
        return True

    def names(self) -> frozenset[str]:
        return frozenset()

    def close(self) -> None:
        """Holds nothing open."""

    def _fill(self, target: Tensor, name: str, shape: tuple[int, ...], rows: slice, columns: slice) -> None:
        num_rows, width = shape[0], math.prod(shape[1:])
        first_row, last_row, _ = rows.indices(num_rows)
        first_column, last_column, _ = columns.indices(width)
        matrix = target.view(last_row - first_row, last_column - first_column)
        center, spread = _center_and_spread(name, shape)
        key = int.from_bytes(hashlib.blake2b(f"{self.seed}:{name}".encode(), digest_size=4).digest(), "little")
        device = target.device
        column_hash = _range(first_column, last_column, device) * _int32(COLUMN_STEP)
        step = max(1, CHUNK_VALUES.get(device.type, 2**18) // max(1, matrix.shape[1]))
        for start in range(0, matrix.shape[0], step):
            part = matrix[start : start + step]
            row = _range(first_row + start, first_row + start + part.shape[0], device)
            row_hash = _mix(row * _int32(ROW_STEP) + _int32(key))
            bits = _mix(row_hash[:, None] + column_hash[None, :])
            part.copy_(bits.to(torch.float32).mul_(spread / 2**31).add_(center))


def _center_and_spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if len(shape) == 1:
        is_norm = "norm" in name.rsplit(".", 2)[-2] and name.endswith(".weight")
        return (1.0, 0.1) if is_norm else (0.0, 0.02)
    if "embed" in name.rsplit(".", 2)[-2] and len(shape) == 2:
        return 0.0, math.sqrt(3.0)
    return 0.0, math.sqrt(3.0 / math.prod(shape[1:]))


def _int32(value: int) -> int:
    return (value & 0xFFFFFFFF) - (1 << 32 if value & 0x80000000 else 0)


def _range(start: int, stop: int, device: torch.device) -> Tensor:
    return torch.arange(start, stop, dtype=torch.int32, device=device)


def _mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser of MurmurHash3 (Appleby, public domain), on a fresh int32 tensor, in place."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(_int32(factor))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
