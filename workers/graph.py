"""A piece of work that a device repeats: recorded once where it is a GPU, called where it is a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Recording(Generic[T]):
    """`work` over fixed tensors, which `replay` does again; what it returned is filled anew each time.

    pool: memory that recordings share which never run at the same time; None for memory of its own.
    """

    def __init__(self, work: Callable[[], T], *, device: torch.device, pool: Any = None) -> None:
        self._work = work
        self._graph: torch.cuda.CUDAGraph | None = None
        self.result = work()  # compiles, and lets libraries allocate what a recording may not
        if device.type != "cuda":
            return
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads of this process may use the device meanwhile, and must not spoil the recording.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.result = work()

    def replay(self) -> T:
        """Enqueues the work."""
        if self._graph is None:
            self.result = self._work()
        else:
            self._graph.replay()
        return self.result
