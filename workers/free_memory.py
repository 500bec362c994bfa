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
_POLL_S = 0.1
_GIB = 2**30


def await_release(config: RankConfig) -> None:
    """Returns when this rank's share of the current GPU is free, or others have given nothing back for a while."""
    share, free = int(_total_bytes() * config.gpu_memory_utilization) // _ranks_on_gpu(config), _free_bytes()
    changed = time.monotonic()
    while free < share and time.monotonic() - changed < STEADY_S:
        time.sleep(_POLL_S)
        before, free = free, _free_bytes()
        if free > before:
            changed = time.monotonic()


def check_room(num_bytes: int, config: RankConfig) -> None:
    """num_bytes: of the KV cache that is to be allocated. Raises `MemoryError`, with the field and its highest value,
    where the current GPU has not so many left."""
    free, total = _free_bytes(), _total_bytes()
    if num_bytes <= free:
        return
    had = f"this GPU of {total / _GIB:.1f} GiB has {free / _GIB:.1f} left, the weights loaded"
    if config.kv_cache_bytes is not None:
        raise MemoryError(f"kv_cache_memory_gib = {num_bytes / _GIB:.3g}: {had}")
    # What the cache would be too large by, of all that the ranks on this GPU may take.
    most = config.gpu_memory_utilization - (num_bytes - free) * _ranks_on_gpu(config) / total
    most = max(0, math.floor(100 * most) / 100)
    field = f"gpu_memory_utilization = {config.gpu_memory_utilization:g}"
    raise MemoryError(f"{field}: must be at most {most:g} beside what others hold: {had}")


def _free_bytes() -> int:
    """Of the current GPU, with what torch keeps for this process and does not use."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _total_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def _ranks_on_gpu(config: RankConfig) -> int:
    return config.world_size if config.share_gpu else 1
