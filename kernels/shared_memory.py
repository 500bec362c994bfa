"""Collectives of the CPU ranks of one node over POSIX shared memory; shared_memory.h tells how they work.

Every call is made by all ranks with equal shapes and dtypes, by one thread at a time. All ranks get the same bits.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import math
import os
import re
from typing import Any

import torch
from torch import Tensor

from dist_vlm.kernels import cpp_library
from dist_vlm.kernels.reduce_add_norm import check_inputs

MAX_RANKS = 32
DEFAULT_CAPACITY = 1 << 19  # 2 to 4 MB take 10 to 15 % less time than in pieces of 1 MiB
MAX_CAPACITY = 1 << 30
MAX_TIMEOUT_S = 86400.0
REDUCED = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int32: "int32",
    torch.int64: "int64",
}

_OK, _TIMED_OUT, _SYSTEM_ERROR, _TAKEN, _OTHER, _FAILED, _NO_GROUP = range(7)
_COLLECTIVES = ("all_reduce", "all_gather", "reduce_add_norm", "attaching")
_LATE, _ENDED, _CLOSED, _MISMATCH = range(1, 5)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")

_int32, _int64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class PeerLost(RuntimeError):  # noqa: N818  what happened, not what was wrong with a call
    """A rank did not arrive at a collective. No rank's group takes calls after it."""


class SharedMemoryGroup:
    """A rank's end of a group of 2 to 32 ranks on one node.

    name: agreed on by the ranks beforehand, and of no other group. Rank 0 makes a segment of that name, the others find
    it; once all have attached the name is gone, so nothing is left in /dev/shm however the ranks end.
    timeout_s: how long a rank waits for the others, to attach and in a collective.
    capacity_bytes: larger tensors go in pieces of this size; the segment takes 2 * world_size times as much.

    Raises `ValueError` for an argument that cannot be used, `TimeoutError` naming the ranks that did not attach, and
    `OSError` where the system has no room. A collective raises `PeerLost` where a rank does not arrive in time or has
    ended, on every rank and with the same rank named; what its tensors hold then is undefined.
    """

    def __init__(
        self, *, rank: int, world_size: int, name: str, timeout_s: float, capacity_bytes: int = DEFAULT_CAPACITY
    ) -> None:
        _check_range("world_size", world_size, 2, MAX_RANKS)
        _check_range("rank", rank, 0, world_size - 1)
        _check_range("capacity_bytes", capacity_bytes, 64, MAX_CAPACITY)
        if capacity_bytes % 64:
            raise ValueError(f"shared memory: capacity_bytes is {capacity_bytes}, must be a multiple of 64")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"shared memory: name is {name!r}, must be 1 to 200 letters, digits and . _ -")
        is_number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool) and math.isfinite(timeout_s)
        if not is_number or not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise ValueError(f"shared memory: timeout_s is {timeout_s!r}, must be above 0, at most {MAX_TIMEOUT_S:g}")
        self.rank, self.world_size, self.name, self.timeout_s = rank, world_size, name, float(timeout_s)
        self._group: int | None = None
        self._functions = _functions()
        self._all_reduce = {dtype: self._functions[f"all_reduce_{suffix}"] for dtype, suffix in REDUCED.items()}
        self._reduce_add_norm = {
            dtype: self._functions[f"reduce_add_norm_{suffix}"] for dtype, suffix in cpp_library.TYPE_NAMES.items()
        }
        self._attach(capacity_bytes)

    def _attach(self, capacity: int) -> None:
        group, detail = _pointer(), _int64()
        outcome = self._functions["attach"](
            f"/{self.name}".encode(),
            self.rank,
            self.world_size,
            capacity,
            self.timeout_s,
            ctypes.byref(group),
            ctypes.byref(detail),
        )
        if outcome == _TIMED_OUT:
            absent, seconds = _ranks(detail.value, self.rank), (detail.value >> 32) / 1000
            raise TimeoutError(f"shared memory {self.name}: {absent} did not attach in {seconds:.1f} s")
        if outcome == _SYSTEM_ERROR:
            hint = f"; the segment needs {2 * self.world_size * capacity} bytes of /dev/shm"
            text = os.strerror(detail.value) + (hint if detail.value in (errno.ENOSPC, errno.ENOMEM) else "")
            raise OSError(detail.value, text, f"/dev/shm/{self.name}")
        if outcome == _TAKEN:
            what = "name is {0!r}, must be of no segment that exists" if self.rank == 0 else "rank is {1}, and taken"
            raise ValueError(f"shared memory {self.name}: " + what.format(self.name, self.rank))
        if outcome == _OTHER:
            raise ValueError(
                f"shared memory {self.name}: world_size and capacity_bytes are {self.world_size} and {capacity}, "
                f"must be those of rank 0, which has {detail.value} for one of them"
            )
        self._group = group.value

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over the ranks in place and returns it: in float32, in the order of the ranks, rounded once."""
        call = self._all_reduce.get(tensor.dtype)
        if call is None:
            allowed = ", ".join(map(str, REDUCED))
            raise TypeError(f"all_reduce: tensor has dtype {tensor.dtype}, must be one of {allowed}")
        if not tensor.is_cpu:
            raise ValueError(f"all_reduce: tensor is on {tensor.device}, must be on the CPU")
        if not tensor.is_contiguous():
            return tensor.copy_(self.all_reduce(tensor.contiguous()))
        if call(self._group, tensor.data_ptr(), tensor.numel()):
            self._raise("all_reduce")
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stacks the ranks' tensors, of any one dtype: [...] -> [world_size, ...], in rank order."""
        if not tensor.is_cpu:
            raise ValueError(f"all_gather: tensor is on {tensor.device}, must be on the CPU")
        tensor = tensor.contiguous()
        out = tensor.new_empty((self.world_size, *tensor.shape))
        if self._functions["all_gather"](self._group, tensor.data_ptr(), out.data_ptr(), tensor.nbytes):
            self._raise("all_gather")
        return out

    def reduce_add_norm(
        self, partial: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float
    ) -> tuple[Tensor, Tensor]:
        """`reduce_add_norm_cpp` over this group in one pass, with the bits of `all_reduce` followed by it."""
        check_inputs(partial, residual, weight)
        call = self._reduce_add_norm.get(partial.dtype)
        if call is None:
            allowed = ", ".join(map(str, cpp_library.TYPE_NAMES))
            raise TypeError(f"reduce_add_norm: partial has dtype {partial.dtype}, must be one of {allowed}")
        for name, tensor in (("partial", partial), ("residual", residual), ("weight", weight)):
            if tensor is not None and not tensor.is_cpu:
                raise ValueError(f"reduce_add_norm: {name} is on {tensor.device}, must be on the CPU")
        normed = torch.empty_like(partial)
        old = None if residual is None else residual.contiguous()
        scale = weight.contiguous()
        failed = call(
            self._group,
            partial.data_ptr(),
            None if old is None else old.data_ptr(),
            scale.data_ptr(),
            normed.data_ptr(),
            *partial.shape,
            eps,
        )
        if failed:
            self._raise("reduce_add_norm")
        return normed, partial

    def set_crossover(self, all_reduce_bytes: int, reduce_add_norm_bytes: int) -> None:
        """From how many bytes of a piece on two shots are taken, in place of the measured sizes; equal on all ranks."""
        if self._group is None:
            raise RuntimeError("set_crossover: the group is closed")
        self._functions["set_crossover"](self._group, all_reduce_bytes, reduce_add_norm_bytes)

    def close(self) -> None:
        """Leaves the group; ranks that still call it lose this one. May be called more than once."""
        group, self._group = self._group, None
        self._functions["close"](group)

    def _raise(self, collective: str) -> None:
        if self._group is None:
            raise RuntimeError(f"{collective}: the group is closed")
        failure = self._functions["failure"](self._group)
        reason, during, milliseconds = failure >> 60, _COLLECTIVES[failure >> 56 & 15], failure >> 32 & 0xFFFFFF
        seconds, ranks = f"{milliseconds / 1000:.1f} s", _ranks(failure, self.rank)
        if reason == _MISMATCH:
            raise RuntimeError(f"{during}: {ranks} made another call or gave another size than the rank that found out")
        raise PeerLost(
            {
                _LATE: f"{during}: {ranks} did not arrive in {seconds}",
                _ENDED: f"{during}: {ranks} ended without arriving, noticed after {seconds}",
                _CLOSED: f"{during}: {ranks} closed the group, noticed after {seconds}",
            }[reason]
        )


def _check_range(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"shared memory: {name} is {value!r}, must be {least} to {most}")


def _ranks(mask: int, own: int) -> str:
    names = [f"{rank} (this rank)" if rank == own else str(rank) for rank in range(MAX_RANKS) if mask >> rank & 1]
    return f"rank {names[0]}" if len(names) == 1 else "ranks " + ", ".join(names)


@functools.cache
def _functions() -> dict[str, Any]:
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "attach": (
            _int32,
            (
                ctypes.c_char_p,
                _int32,
                _int32,
                _int64,
                ctypes.c_double,
                ctypes.POINTER(_pointer),
                ctypes.POINTER(_int64),
            ),
        ),
        "close": (None, (_pointer,)),
        "failure": (ctypes.c_uint64, (_pointer,)),
        "set_crossover": (None, (_pointer, _int64, _int64)),
        "all_gather": (_int32, (_pointer, _pointer, _pointer, _int64)),
    }
    for suffix in REDUCED.values():
        signatures[f"all_reduce_{suffix}"] = (_int32, (_pointer, _pointer, _int64))
    for suffix in cpp_library.TYPE_NAMES.values():
        signatures[f"reduce_add_norm_{suffix}"] = (_int32, (*[_pointer] * 5, _int64, _int64, ctypes.c_float))
    found = {}
    for name, (result, arguments) in signatures.items():
        entry = getattr(cpp_library.library(), f"shared_memory_{name}")
        entry.restype, entry.argtypes = result, arguments
        found[name] = entry
    return found
