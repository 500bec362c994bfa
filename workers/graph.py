"""A piece of work that a device repeats: recorded once where it is a GPU, called where it is a CPU."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from dist_vlm.workers.comm import CollectiveCount

T = TypeVar("T")

# Free memory of a GPU below which a recording first takes what the allocator keeps for nothing.
_SPARE_BYTES = 1 << 30


class Recording(Generic[T]):
    """`work` over fixed tensors, which `replay` does again; what it returned is filled anew each time.

    pool: memory that recordings share which never run at the same time; None for memory of its own.
    count: of the group whose collectives are part of the work; a replay counts those that it makes.
    """

    def __init__(
        self,
        work: Callable[[], T],
        *,
        device: torch.device,
        pool: Any = None,
        count: CollectiveCount | None = None,
    ) -> None:
        self._work = work
        self._count = CollectiveCount() if count is None else count
        self._graph: torch.cuda.CUDAGraph | None = None
        self.result = work()  # compiles, and lets libraries allocate what a recording may not
        if device.type == "cuda":
            self._graph = torch.cuda.CUDAGraph()
            made = self._count.all_reduce, self._count.all_gather
            self.result = _capture(self._graph, work, pool)
            self._all_reduces, self._all_gathers = self._count.all_reduce - made[0], self._count.all_gather - made[1]
            self._count.all_reduce, self._count.all_gather = made  # recorded, not made

    def replay(self) -> T:
        """Enqueues the work."""
        if self._graph is None:
            self.result = self._work()
        else:
            self._graph.replay()
            self._count.all_reduce += self._all_reduces
            self._count.all_gather += self._all_gathers
        return self.result


def _capture(graph: torch.cuda.CUDAGraph, work: Callable[[], T], pool: Any) -> T:
    """What `torch.cuda.graph` does, but for giving back all memory that the allocator keeps: on the device and, pinned,
    on the host. The steps after it would take that anew, which lasts longer than the recording."""
    torch.cuda.synchronize()
    if torch.cuda.mem_get_info()[0] < _SPARE_BYTES:
        torch.cuda.empty_cache()
    was_collecting = gc.isenabled()
    gc.disable()  # what it frees could call the device, and spoil the recording
    try:
        with torch.cuda.stream(_stream(torch.cuda.current_device())):
            # Other threads of this process may use the device meanwhile, and must not spoil it either.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                return work()
            finally:
                graph.capture_end()
    finally:
        if was_collecting:
            gc.enable()


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """The one that work is recorded on: libraries keep memory for each stream they have seen."""
    return torch.cuda.Stream(device)
