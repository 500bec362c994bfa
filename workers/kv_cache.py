"""One rank's part of the block-table KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KVCache:
    """keys, values: one tensor a layer, each [num_blocks, block_size, num_kv_heads of this rank, head_dim].

    Block ids are the driver's, the same on every rank; each rank holds its own heads of a block.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    @classmethod
    def allocate(
        cls,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        keys = tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers))
        values = tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers))
        return cls(keys, values)

    @property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.keys + self.values)

    def copy_blocks(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copies whole blocks (source, destination) in every layer, in order."""
        for source, destination in pairs:
            for part in self.keys + self.values:
                part[destination].copy_(part[source])


def block_bytes(*, num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one block on one rank: keys and values of all layers."""
    return 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize
