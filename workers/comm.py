"""The collectives of one tensor-parallel group.

With one rank every call is the identity and nothing is counted: no process group exists.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from dist_vlm.workers.collectives import Collectives

ReduceAddNorm = Callable[..., tuple[torch.Tensor, torch.Tensor]]


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
    """A rank's handle on its group. `group` is None for a single rank.

    collectives: what takes the place of the group's own collectives where it can; None for those alone.
    """

    rank: int
    world_size: int
    group: dist.ProcessGroup | None = None
    count: CollectiveCount = field(default_factory=CollectiveCount)
    collectives: Collectives | None = None

    @property
    def name(self) -> str:
        """What adds up, for the log."""
        if self.world_size == 1:
            return "one rank"
        return str(dist.get_backend(self.group)) if self.collectives is None else self.collectives.name

    @property
    def is_recordable(self) -> bool:
        """Whether the collectives may be part of a CUDA graph."""
        if self.world_size == 1 or (self.collectives is not None and self.collectives.is_recordable):
            return True
        return dist.get_backend(self.group) == "nccl"

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums `tensor` over the ranks in place and returns it; every rank gets the same bits."""
        if self.world_size > 1:
            self.count.all_reduce += 1
            if self.collectives is None or not self.collectives.all_reduce(tensor):
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def reduce_add_norm(
        self,
        partial: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        *,
        eps: float,
        op: ReduceAddNorm,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`dist_vlm.kernels.reduce_add_norm` over this group: fused with the sum, or `op` around an all-reduce."""
        if self.collectives is not None:
            done = self.collectives.reduce_add_norm(partial, residual, weight, eps=eps)
            if done is not None:
                self.count.all_reduce += 1
                return done
        return op(partial, residual, weight, eps=eps, all_reduce=self.all_reduce)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Stacks the ranks' equally shaped tensors: [...] -> [world_size, ...], in rank order."""
        if self.world_size == 1:
            return tensor.unsqueeze(0)
        self.count.all_gather += 1
        if self.collectives is not None:
            gathered = self.collectives.all_gather(tensor)
            if gathered is not None:
                return gathered
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.stack(parts)

    def gather_columns(self, part: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Fills `out` with the ranks' columns one after another, cut off at its width, and returns it.

        part: [R, count] -> out: [R, width] of any float dtype, width at most world_size * count.
        """
        if self.collectives is not None and self.collectives.gather_columns(part, out):
            self.count.all_gather += 1
            return out
        gathered = self.all_gather(part)  # [world_size, R, count]
        return out.copy_(gathered.transpose(0, 1).flatten(1)[:, : out.shape[1]])

    def gather_on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Stacks the ranks' CPU tensors, by the process group's own collective, whatever `collectives` are there."""
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        parts = [torch.empty_like(tensor, device=device) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.to(device), group=self.group)
        return torch.stack(parts).cpu()

    def check(self) -> None:
        """Raises `CollectiveError` if a collective that has ended was not whole."""
        if self.collectives is not None:
            self.collectives.check()

    def close(self) -> None:
        if self.collectives is not None:
            self.collectives.close()
            self.collectives = None
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
