"""Collectives that may take the place of the process group's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_vlm.kernels.all_reduce.rules import Rules


class CollectiveError(RuntimeError):
    """A rank did not take part in a collective; the message names it. The group is not to be used again."""


class Collectives(Protocol):
    """A call that answers None, or False, leaves the tensor to the process group: all ranks answer alike.

    Every method is called by all ranks in the same order, with equally shaped tensors.
    """

    @property
    def name(self) -> str: ...

    @property
    def is_recordable(self) -> bool:
        """Whether calls with the floats of the kernels can be part of a CUDA graph; others are left to the group."""
        ...

    def edges(self, op: str) -> list[int]:
        """Bytes of a rank's part at which an op may go another way than with more; see `Rules`."""
        ...

    def all_reduce(self, tensor: Tensor) -> bool: ...

    def reduce_add_norm(
        self, partial: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float
    ) -> tuple[Tensor, Tensor] | None: ...

    def all_gather(self, part: Tensor) -> Tensor | None: ...

    def gather_columns(self, part: Tensor, out: Tensor) -> bool: ...

    def check(self) -> None:
        """Raises `CollectiveError` if a call that has ended did not get all parts. Does not wait for the device."""
        ...

    def close(self) -> None: ...


class PeerPath:
    """Over the peers' memory on GPUs, or left to the process group, by the size: see `Rules`.

    peers: a `PeerCollectives`. timeout_s: what its looks amount to, for the message.
    """

    name = "peer memory"
    is_recordable = True

    def __init__(self, peers: Any, rules: Rules, *, timeout_s: float) -> None:
        self._peers, self._rules, self._timeout_s = peers, rules, timeout_s

    def edges(self, op: str) -> list[int]:
        return self._rules.edges(op)

    def all_reduce(self, tensor: Tensor) -> bool:
        shots, _ = self._way("all_reduce", tensor)
        if not shots or not tensor.is_contiguous():
            return False
        self._peers.all_reduce(tensor, shots=shots)
        return True

    def reduce_add_norm(
        self, partial: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float
    ) -> tuple[Tensor, Tensor] | None:
        shots, fused = self._way("reduce_add_norm", partial)
        if not fused:
            return None
        normed, summed = self._peers.reduce_add_norm(partial, residual, weight, eps=eps, shots=shots)
        return normed, summed

    def all_gather(self, part: Tensor) -> Tensor | None:
        shots, _ = self._way("all_gather", part)
        gathered: Tensor | None = self._peers.all_gather(part) if shots else None
        return gathered

    def gather_columns(self, part: Tensor, out: Tensor) -> bool:
        shots, _ = self._way("all_gather", part)
        if shots:
            self._peers.all_gather(part, out=out)
        return bool(shots)

    def check(self) -> None:
        missing = self._peers.buffers.missing_ranks()
        if missing is not None:
            names = ", ".join(map(str, missing))
            raise CollectiveError(f"rank {names} took no part in a collective within {self._timeout_s:g} s")

    def close(self) -> None:
        self._peers = None

    def _way(self, op: str, tensor: Tensor) -> tuple[int, bool]:
        """Shots, 0 for the process group; and whether they are fused with the norm."""
        if not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return 0, False
        rule = self._rules.choose(op, tensor.numel() * tensor.element_size())
        return {"one_shot": 1, "two_shot": 2, "group": 0}[rule.path], rule.fused


class SharedMemoryPath:
    """Over memory that the CPU ranks of a node share. segment: a `SharedMemoryGroup`."""

    name = "shared memory"
    is_recordable = False

    def __init__(self, segment: Any) -> None:
        self._segment = segment

    def edges(self, op: str) -> list[int]:
        # Where one shot gives way to two depends on the ranks: somewhere between these.
        return [1 << power for power in range(10, 22, 2)]

    def all_reduce(self, tensor: Tensor) -> bool:
        if not self._reduces(tensor):
            return False
        self._call(lambda: self._segment.all_reduce(tensor))
        return True

    def reduce_add_norm(
        self, partial: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float
    ) -> tuple[Tensor, Tensor] | None:
        if not self._reduces(partial):
            return None
        found: tuple[Tensor, Tensor] = self._call(
            lambda: self._segment.reduce_add_norm(partial, residual, weight, eps=eps)
        )
        return found

    def all_gather(self, part: Tensor) -> Tensor | None:
        gathered: Tensor = self._call(lambda: self._segment.all_gather(part))
        return gathered

    def gather_columns(self, part: Tensor, out: Tensor) -> bool:
        return False

    def check(self) -> None:
        """A call that does not get all parts raises by itself."""

    def close(self) -> None:
        self._segment.close()

    def _reduces(self, tensor: Tensor) -> bool:
        from dist_vlm.kernels.shared_memory import REDUCED

        return tensor.dtype in REDUCED

    def _call(self, work: Callable[[], Any]) -> Any:
        from dist_vlm.kernels.shared_memory import PeerLost

        try:
            return work()
        except PeerLost as error:
            raise CollectiveError(str(error)) from None
