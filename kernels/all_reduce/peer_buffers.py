"""The memory that a group's collectives go through, and one rank's view of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MIN_RANKS, MAX_RANKS = 2, 8
# Twice negative zero in 16 bits, so that a place is empty for a reader of any dtype.
EMPTY = -0x7FFF8000
EMPTY_BYTES = 4
NUM_BUFFERS = 3
# What a program empties at once; a buffer is a whole number of such blocks.
CLEARED_WORDS = 2048
# Bytes of a buffer in a launch: two shots of 8 MiB, 1024 rows of 4096 numbers of 16 bits.
PEER_CAPACITY = 16 << 20
# Programs of one kernel, at most.
MAX_PROGRAMS = 256
# Of `state`: calls made, one number a program; elements of 32 bits used in each buffer.
_STATE_SIZE = MAX_PROGRAMS + NUM_BUFFERS


@dataclasses.dataclass(frozen=True, slots=True)
class PeerBuffers:
    """One rank's view.

    memory: int32, the rank's own three buffers, `capacity` bytes each, one after another.
    addresses: int64 [world_size], on the device: where the memory of each rank begins.
    state: int64, on the device: how far this rank is.
    error: int32 [1], on the device: 1 once a call has given up.
    report: int32 [1], in memory of the host: the ranks it missed, as bits.
    owner: what keeps the peers' memory mapped.
    """

    rank: int
    world_size: int
    capacity: int
    memory: Tensor
    addresses: Tensor
    state: Tensor
    error: Tensor
    report: Tensor
    owner: Any = None

    @property
    def device(self) -> torch.device:
        return self.memory.device

    def missing_ranks(self) -> list[int] | None:
        """Ranks that a call has given up waiting for, None where all went well so far. Does not wait for the device."""
        missed = int(self.report[0])
        return [rank for rank in range(self.world_size) if missed >> rank & 1] if missed else None


def memory_bytes(capacity: int) -> int:
    """Bytes of a rank's `memory`."""
    return NUM_BUFFERS * capacity


def check_sizes(*, world_size: int, capacity: int) -> None:
    """Raises `ValueError` for a group that the kernels do not serve."""
    if not MIN_RANKS <= world_size <= MAX_RANKS:
        raise ValueError(f"world_size is {world_size}, must be from {MIN_RANKS} to {MAX_RANKS}")
    block = CLEARED_WORDS * EMPTY_BYTES
    if capacity <= 0 or capacity % block:
        raise ValueError(f"capacity is {capacity}, must be a positive multiple of {block} bytes")


def view(memory: Tensor, addresses: Sequence[int], *, rank: int, owner: Any = None) -> PeerBuffers:
    """Rank `rank`'s view of buffers whose ranks have mapped each other's memory.

    memory: int32 on the rank's device, `memory_bytes(capacity)` of it; filled with `EMPTY` here. No rank may send
        before all have come this far: the caller waits for them.
    addresses: where this rank finds each rank's memory, its own included.
    """
    if memory.dtype != torch.int32 or not memory.is_contiguous():
        raise ValueError(f"memory is {memory.dtype} with strides {memory.stride()}, must be int32 and contiguous")
    capacity = memory.numel() * EMPTY_BYTES // NUM_BUFFERS
    check_sizes(world_size=len(addresses), capacity=capacity)
    if capacity * NUM_BUFFERS != memory.numel() * EMPTY_BYTES:
        raise ValueError(f"memory has {memory.numel()} elements, must be {NUM_BUFFERS} buffers of equal size")
    if not 0 <= rank < len(addresses):
        raise ValueError(f"rank is {rank}, must be from 0 to {len(addresses) - 1}")
    memory.fill_(EMPTY)
    device = memory.device
    return PeerBuffers(
        rank=rank,
        world_size=len(addresses),
        capacity=capacity,
        memory=memory,
        addresses=torch.tensor(list(addresses), dtype=torch.int64, device=device),
        state=torch.zeros(_STATE_SIZE, dtype=torch.int64, device=device),
        error=torch.zeros(1, dtype=torch.int32, device=device),
        report=torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda"),
        owner=owner,
    )
