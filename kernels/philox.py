"""Counter-based random numbers: the same key and counter give the same bits on any device, in any batch.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011): ten
rounds on a counter of four 32-bit words under a key of two, where a round is

    (c0, c1, c2, c3) -> (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0))

and the key grows by Weyl constants between rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words for each counter. Arguments and results: int64 tensors of values below 2**32, broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_M0, c0)
        high1, low1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 64-bit product. int64 wraps like uint64; the mask removes the sign's copies."""
    product = word * constant
    return (product >> 32) & _MASK, product & _MASK


def uniform_noise(seed: Tensor, sample_index: Tensor, position: Tensor, width: int) -> Tensor:
    """Uniform noise in the open interval (0, 1), float32 [rows, width].

    seed: int64 [rows], 0 .. 2**63 - 1. sample_index, position: int64 [rows], below 2**32. Column v of a row is
    word v % 4 of the counter (v // 4, position, sample_index, 0) under the key seed; 23 bits of it, centred.
    """
    quads = torch.arange(-(-width // 4), dtype=torch.int64, device=seed.device)
    counter = (
        quads.unsqueeze(0),
        position.unsqueeze(1) & _MASK,
        sample_index.unsqueeze(1) & _MASK,
        torch.zeros_like(seed).unsqueeze(1),
    )
    key = (seed.unsqueeze(1) & _MASK, (seed.unsqueeze(1) >> 32) & _MASK)
    words = torch.stack(torch.broadcast_tensors(*philox4x32(counter, key)), dim=-1)
    bits = words.reshape(seed.shape[0], -1)[:, :width] >> 9
    return (bits.to(torch.float32) + 0.5) * 2.0**-23
