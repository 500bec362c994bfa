"""Whether a GPU has the memory that a rank is to have, told by the field to change and not by a failed allocation.

Processes that have just been killed hold theirs until the driver has cleared it away, so a rank in the place of a lost
one waits for it.
"""

from __future__ import annotations

import math
import time

import torch

from dist_vlm.workers.config import RankConfig

# Without a change for so long, what others hold they are going to keep.
STEADY_S = 3.0
# What a process needs to use a GPU at all, beside what it allocates.
CONTEXT_BYTES = 1 << 30
_POLL_S = 0.1
_GIB = 2**30


def await_release(config: RankConfig) -> None:
    """Returns when the current GPU has what this rank is to allocate, its KV cache alone where that has a size; or when
    others have given nothing back for a while."""
    needed, free = _needed_bytes(config), _free_bytes()
    changed = time.monotonic()
    while free < needed and time.monotonic() - changed < STEADY_S:
        time.sleep(_POLL_S)
        before, free = free, _free_bytes()
        if free > before:
            changed = time.monotonic()


def check_room(cache_bytes: int, arena_bytes: int, config: RankConfig) -> None:
    """cache_bytes: of the KV cache that is to be allocated. arena_bytes: what is allocated after it, at most. Raises
    `MemoryError` where the current GPU has less left, with the fields; and with the highest value that has room, where
    no other rank's memory depends on it too."""
    free, total = _free_bytes(), _total_bytes()
    missing = cache_bytes + arena_bytes - free
    if missing <= 0:
        return
    had = f"of this GPU's {total / _GIB:.1f} GiB {free / _GIB:.1f} are left"
    if config.kv_cache_bytes is not None:
        highest = max(0.0, (cache_bytes - missing) / _GIB)
        raise MemoryError(
            f"kv_cache_memory_gib or num_gpu_blocks_override asks for {cache_bytes / _GIB:.2f} GiB: {had};"
            f" must be at most {math.floor(100 * highest) / 100:.2f}, for {arena_bytes / _GIB:.2f} are needed beside it"
        )
    field = f"gpu_memory_utilization = {config.gpu_memory_utilization:g}: {missing / _GIB:.2f} GiB are missing, {had}"
    if config.share_gpu:
        raise MemoryError(field)
    highest = max(0.0, config.gpu_memory_utilization - missing / total)
    raise MemoryError(f"{field}; must be at most {math.floor(100 * highest) / 100:g} beside what others hold")


def _needed_bytes(config: RankConfig) -> int:
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes
    ranks_on_gpu = config.world_size if config.share_gpu else 1
    share = int(_total_bytes() * config.gpu_memory_utilization) // ranks_on_gpu
    return min(share, _total_bytes() - CONTEXT_BYTES) - torch.cuda.memory_allocated()


def _free_bytes() -> int:
    """Of the current GPU, with what torch keeps for this process and does not use."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _total_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
