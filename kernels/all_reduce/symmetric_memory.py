"""`PeerBuffers` of ranks that are processes, in torch's symmetric memory."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

from dist_vlm.kernels.all_reduce.peer_buffers import EMPTY_BYTES, PeerBuffers, memory_bytes, view


def allocate(*, device: torch.device, capacity: int, share_gpu: bool = False) -> Tensor:
    """The rank's own memory, which `share` maps into the other ranks' processes.

    capacity: bytes of one of the rank's buffers.
    share_gpu: whether several ranks use one GPU, which torch refuses unless told that it is meant.
    """
    import torch.distributed._symmetric_memory as symmetric_memory

    # The kernels write to one rank at a time, and multicast cannot be had on every machine.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    if share_gpu:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    return symmetric_memory.empty(memory_bytes(capacity) // EMPTY_BYTES, dtype=torch.int32, device=device)


def share(memory: Tensor, group: dist.ProcessGroup) -> PeerBuffers:
    """Maps the memory of all ranks of `group` into this process; every rank calls it with what `allocate` gave it.

    The buffers are empty when it returns, this rank's: none may send before all ranks have come so far.
    Raises `RuntimeError` where the devices cannot reach each other's memory, `ValueError` as `view` does.
    """
    import torch.distributed._symmetric_memory as symmetric_memory

    handle = symmetric_memory.rendezvous(memory, group)
    buffers = view(memory, handle.buffer_ptrs, rank=handle.rank, owner=handle)
    torch.cuda.synchronize(memory.device)
    return buffers
