"""The collectives of one tensor-parallel group.

With one rank every call is the identity and nothing is counted: no process group exists.
"""

from __future__ import annotations

import datetime
import os
import socket
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass(slots=True)
class CollectiveCount:
    """Collective calls since the start, by kind; a step's count is a difference of two readings."""

    all_reduce: int = 0
    all_gather: int = 0

    @property
    def total(self) -> int:
        return self.all_reduce + self.all_gather


@dataclass(slots=True)
class Communicator:
    """A rank's handle on its group. `group` is None for a single rank."""

    rank: int
    world_size: int
    group: dist.ProcessGroup | None = None
    count: CollectiveCount = field(default_factory=CollectiveCount)

    @property
    def is_recordable(self) -> bool:
        """Whether the collectives may be part of a CUDA graph."""
        return self.world_size == 1 or dist.get_backend(self.group) == "nccl"

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums `tensor` over the ranks in place and returns it; every rank gets the same bits."""
        if self.world_size > 1:
            self.count.all_reduce += 1
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Stacks the ranks' equally shaped tensors: [...] -> [world_size, ...], in rank order."""
        if self.world_size == 1:
            return tensor.unsqueeze(0)
        self.count.all_gather += 1
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.stack(parts)

    def close(self) -> None:
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None


def single_rank() -> Communicator:
    return Communicator(rank=0, world_size=1)


def host_store(host: str, world_size: int, timeout_s: float) -> dist.TCPStore:
    """Opens the group's rendezvous on a port the system chooses; rank 0 calls it and passes `.port` on.

    It listens on `host` alone: left to itself the store would listen on every interface of the machine.
    """
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=datetime.timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        # The libuv server does not take a listener of ours on every version of torch.
        use_libuv=False,
    )


def join_store(host: str, port: int, world_size: int, timeout_s: float) -> dist.TCPStore:
    timeout = datetime.timedelta(seconds=timeout_s)
    return dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout, wait_for_workers=False)


def join_group(
    store: dist.TCPStore, *, rank: int, world_size: int, backend: str, timeout_s: float, host: str
) -> Communicator:
    """Joins the tensor-parallel group.

    backend: "nccl", or "gloo" for CPU ranks and for ranks that share a GPU.
    host: this rank's own address; where it is 127.0.0.1, the group listens there and nowhere else.
    """
    if host == "127.0.0.1":
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    return Communicator(rank=rank, world_size=world_size, group=dist.group.WORLD)
