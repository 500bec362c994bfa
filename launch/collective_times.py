"""How long each way of a collective takes on this rank's GPU, recorded, beside what the link allows."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_vlm.kernels.all_reduce.peer_buffers import PEER_CAPACITY
from dist_vlm.kernels.all_reduce.peer_collectives import PeerCollectives
from dist_vlm.kernels.all_reduce.symmetric_memory import allocate, share
from dist_vlm.kernels.reduce_add_norm_triton import reduce_add_norm_triton

# Calls in a recording, and replays of it that are timed.
_CALLS = 20
_REPLAYS = 7
_EPS = 1e-5
# Ours, one by one, are slower than any other beyond it by far.
_MOST_ONE_SHOT_BYTES = 4 << 20
_MAX_LOOKS = 100_000_000

Ways = dict[str, Callable[[], Any]]


class CollectiveTimes:
    """group: of NCCL. hidden_size: numbers of a row; columns: of a rank's part of the logits."""

    def __init__(self, group: dist.ProcessGroup, *, hidden_size: int, columns: int, dtype: torch.dtype) -> None:
        self._group = group
        self._hidden_size = hidden_size
        self._columns = columns
        self._dtype = dtype
        self._device = torch.device("cuda", torch.cuda.current_device())
        buffers = share(allocate(device=self._device, capacity=PEER_CAPACITY), group)
        self._peers = PeerCollectives(buffers, max_looks=_MAX_LOOKS)
        dist.barrier(group)  # no rank sends before all buffers are empty

    def measure(self, row_counts: list[int], *, others: bool) -> list[dict[str, Any]]:
        """A record a size and op: bytes of a rank's part, and microseconds by way.

        others: also torch's own operations over symmetric memory.
        """
        found = []
        for rows in row_counts:
            for op, width, ways in (
                ("reduce_add_norm", self._hidden_size, self._reduce_add_norm(rows)),
                ("all_reduce", self._hidden_size, self._all_reduce(rows, others=others)),
                ("all_gather", self._columns, self._all_gather(rows)),
            ):
                num_bytes = rows * width * self._dtype.itemsize
                times = {name: self._time(call) for name, call in ways.items()}
                found.append({"op": op, "rows": rows, "bytes": num_bytes, "microseconds": times})
        return found

    def link_bytes_per_s(self) -> float:
        """What this rank writes into the next rank's memory in a copy of 128 MiB."""
        import torch.distributed._symmetric_memory as symmetric_memory

        size = 128 << 20
        memory = symmetric_memory.empty(size, dtype=torch.uint8, device=self._device)
        handle = symmetric_memory.rendezvous(memory, self._group)
        peer = handle.get_buffer((handle.rank + 1) % handle.world_size, (size,), torch.uint8)
        source = torch.zeros(size, dtype=torch.uint8, device=self._device)
        return size / (self._time(lambda: peer.copy_(source)) * 1e-6)

    def _part(self, rows: int, width: int) -> Tensor:
        return torch.randn(rows, width, device=self._device).to(self._dtype)

    def _reduce_add_norm(self, rows: int) -> Ways:
        part, residual = self._part(rows, self._hidden_size), self._part(rows, self._hidden_size)
        weight = torch.ones(self._hidden_size, device=self._device, dtype=self._dtype)

        def unfused(all_reduce: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
            return lambda: reduce_add_norm_triton(part, residual, weight, eps=_EPS, all_reduce=all_reduce)

        def fused(shots: int) -> Callable[[], Any]:
            return lambda: self._peers.reduce_add_norm(part, residual, weight, eps=_EPS, shots=shots)

        ways: Ways = {
            "group": unfused(self._by_group),
            "two_shot": unfused(lambda tensor: self._peers.all_reduce(tensor, shots=2)),
            "two_shot fused": fused(2),
        }
        if self._is_small(part):
            ways["one_shot"] = unfused(lambda tensor: self._peers.all_reduce(tensor, shots=1))
            ways["one_shot fused"] = fused(1)
        return ways

    def _all_reduce(self, rows: int, *, others: bool) -> Ways:
        part = self._part(rows, self._hidden_size)
        ways: Ways = {
            "group": lambda: self._by_group(part),
            "two_shot": lambda: self._peers.all_reduce(part, shots=2),
        }
        if self._is_small(part):
            ways["one_shot"] = lambda: self._peers.all_reduce(part, shots=1)
        return ways | (self._torch_ways(part) if others else {})

    def _torch_ways(self, part: Tensor) -> Ways:
        import torch.distributed._symmetric_memory as symmetric_memory

        memory = symmetric_memory.empty(part.numel(), dtype=part.dtype, device=self._device)
        symmetric_memory.rendezvous(memory, self._group)
        memory.copy_(part.flatten())
        name, ops = self._group.group_name, torch.ops.symm_mem
        ways: Ways = {"torch two_shot": lambda: ops.two_shot_all_reduce_(memory, "sum", name)}
        if self._is_small(part):
            ways["torch one_shot"] = lambda: ops.one_shot_all_reduce(memory, "sum", name)
        return ways

    def _all_gather(self, rows: int) -> Ways:
        part = self._part(rows, self._columns)
        out = torch.empty(rows, self._columns * self._group.size(), device=self._device, dtype=torch.float32)
        stacked = torch.empty(self._group.size(), *part.shape, device=self._device, dtype=self._dtype)

        def by_group() -> None:
            dist.all_gather_into_tensor(stacked, part, group=self._group)
            out.copy_(stacked.transpose(0, 1).flatten(1))

        return {"group": by_group, "one_shot": lambda: self._peers.all_gather(part, out=out)}

    def _by_group(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def _is_small(self, part: Tensor) -> bool:
        return part.numel() * part.element_size() <= _MOST_ONE_SHOT_BYTES

    def _time(self, call: Callable[[], Any]) -> float:
        """Microseconds of one call: the median replay of the slowest rank."""
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(_CALLS):
                call()
        times = []
        for _ in range(_REPLAYS):
            dist.barrier(self._group)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()  # ranks come to the second replay together
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / _CALLS)
        slowest = torch.tensor([statistics.median(times)], device=self._device, dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=self._group)
        missing = self._peers.buffers.missing_ranks()
        if missing is not None:
            raise RuntimeError(f"ranks {missing} took no part in a collective")
        return float(slowest)
