"""`PeerBuffers` of ranks that are processes, in torch's symmetric memory."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from dist_vlm.kernels.all_reduce.peer_buffers import PeerBuffers, check_sizes, memory_bytes, view


def open_buffers(
    group: dist.ProcessGroup, *, device: torch.device, capacity: int, share_gpu: bool = False
) -> PeerBuffers:
    """Maps the memory of all ranks of `group` into this process. Every rank calls it; returns once all have.

    capacity: bytes of one of the rank's buffers.
    share_gpu: whether several ranks use one GPU, which torch refuses unless told that it is meant.
    Raises `RuntimeError` where the devices cannot reach each other's memory, `ValueError` as `check_sizes` does.
    """
    import torch.distributed._symmetric_memory as symmetric_memory

    check_sizes(world_size=group.size(), capacity=capacity)
    # The kernels write to one rank at a time, and multicast cannot be had on every machine.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    if share_gpu:
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    memory = symmetric_memory.empty(memory_bytes(capacity) // 4, dtype=torch.int32, device=device)
    handle = symmetric_memory.rendezvous(memory, group)
    buffers = view(memory, handle.buffer_ptrs, rank=handle.rank, owner=handle)
    torch.cuda.synchronize(device)
    dist.barrier(group)  # nobody sends before all buffers are empty
    return buffers
