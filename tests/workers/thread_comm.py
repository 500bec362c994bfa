"""Ranks as threads of one process: the collectives of `Communicator` without process groups."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from dist_vlm.workers.comm import Communicator

Result = TypeVar("Result")
TIMEOUT_S = 60.0


class ThreadComm(Communicator):
    """One rank's handle; `board` is what the ranks of a group share."""

    __slots__ = ("barrier", "board")

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, board: list[torch.Tensor]) -> None:
        super().__init__(rank=rank, world_size=world_size)
        self.barrier = barrier
        self.board = board

    @property
    def name(self) -> str:
        return "threads"

    def _exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Copies of the ranks' tensors, in rank order."""
        self.board[self.rank] = tensor.clone()
        self.barrier.wait(TIMEOUT_S)
        parts = [part.clone() for part in self.board]
        self.barrier.wait(TIMEOUT_S)
        if {part.shape for part in parts} != {tensor.shape}:
            raise RuntimeError(f"ranks brought different shapes: {[list(part.shape) for part in parts]}")
        return parts

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world_size > 1:
            self.count.all_reduce += 1
            parts = self._exchange(tensor)
            tensor.copy_(parts[0])
            for part in parts[1:]:
                tensor.add_(part)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world_size == 1:
            return tensor.unsqueeze(0)
        self.count.all_gather += 1
        return torch.stack(self._exchange(tensor))


def thread_comms(world_size: int) -> list[ThreadComm]:
    barrier, board = threading.Barrier(world_size), [torch.empty(0)] * world_size
    return [ThreadComm(rank, world_size, barrier, board) for rank in range(world_size)]


def on_ranks(comms: list[ThreadComm], work: Callable[[int], Result]) -> list[Result]:
    """Runs `work(rank)` on every rank at once and returns the results in rank order."""

    def run(rank: int) -> Result:
        try:
            with torch.inference_mode():
                return work(rank)
        except BaseException:
            comms[rank].barrier.abort()
            raise

    with ThreadPoolExecutor(len(comms)) as pool:
        return list(pool.map(run, range(len(comms))))
