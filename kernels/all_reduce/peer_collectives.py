"""A rank's collectives over `PeerBuffers`: what is checked and launched."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_vlm.kernels.all_reduce.all_gather_triton import all_gather_kernel
from dist_vlm.kernels.all_reduce.one_shot_triton import one_shot_kernel
from dist_vlm.kernels.all_reduce.peer_buffers import MAX_PROGRAMS, PeerBuffers
from dist_vlm.kernels.all_reduce.two_shot_triton import two_shot_kernel
from dist_vlm.kernels.checks import check_dense, check_float
from dist_vlm.kernels.early_start_triton import launch_early
from dist_vlm.kernels.reduce_add_norm import check_inputs
from dist_vlm.kernels.triton_support import triton_interpreted

# Columns of a row where rows are of our own making.
_FLAT_WIDTH = 2048
_GATHER_TILE = 1024
# Numbers of a thread: one write of 16 bytes of bfloat16.
_THREAD_NUMBERS = 8
_MAX_WARPS = 16
# Numbers of all ranks that a thread looks at together: more would not fit its registers.
_LOOKED_NUMBERS = 64
_KERNELS = {1: one_shot_kernel, 2: two_shot_kernel}


class PeerCollectives:
    """All calls of all ranks must be the same, in the same order, each rank's on one stream.

    max_looks: how often a program looks for data before it gives up; a GPU takes about a microsecond for one.
    max_programs: of one kernel. All of them must fit the device at once, beside those of other ranks on it.
    starts_early: whether a call lets the kernel after it start before it has ended. That one takes what room there is
        on the device, which ranks that share one may need for the call itself.
    """

    def __init__(
        self, buffers: PeerBuffers, *, max_looks: int, max_programs: int | None = None, starts_early: bool = True
    ) -> None:
        if max_looks < 1:
            raise ValueError(f"max_looks is {max_looks}, must be at least 1")
        most = _num_processors(buffers.device) if max_programs is None else max_programs
        if not 1 <= most <= MAX_PROGRAMS:
            raise ValueError(f"max_programs is {most}, must be from 1 to {MAX_PROGRAMS}")
        self.buffers = buffers
        self._max_looks = max_looks
        self._max_programs = most
        self._starts_early = starts_early
        self._lanes = triton.next_power_of_2(buffers.world_size)

    @property
    def world_size(self) -> int:
        return self.buffers.world_size

    def all_reduce(self, tensor: Tensor, *, shots: int) -> Tensor:
        """Sums `tensor` over the ranks in place and returns it. float32, bfloat16 or float16, contiguous."""
        check_float("all_reduce", "tensor", tensor)
        check_dense("all_reduce", "tensor", tensor)
        flat = tensor.view(-1)
        # One width for all sizes: a kernel is compiled for each.
        for piece in flat.split(self._most_rows(shots, _FLAT_WIDTH * tensor.element_size()) * _FLAT_WIDTH):
            if piece.shape[0]:
                self._reduce(piece, None, None, piece, width=_FLAT_WIDTH, eps=0.0, shots=shots)
        return tensor

    def reduce_add_norm(
        self, partial: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, shots: int
    ) -> tuple[Tensor, Tensor]:
        """`dist_vlm.kernels.reduce_add_norm` in one kernel; s takes the place of the partial sum."""
        check_inputs(partial, residual, weight)
        check_float("reduce_add_norm", "partial", partial)
        normed = torch.empty_like(partial)
        if not partial.numel():
            return normed, partial
        if residual is not None and residual.stride(1) != 1:
            residual = residual.contiguous()
        weight = weight if weight.stride(0) == 1 else weight.contiguous()
        num_rows, width = partial.shape
        most = self._most_rows(shots, width * partial.element_size())
        for start in range(0, num_rows, most):
            rows = slice(start, start + most)
            old = None if residual is None else residual[rows]
            self._reduce(partial[rows], old, weight, normed[rows], width=width, eps=eps, shots=shots)
        return normed, partial

    def all_gather(self, part: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Stacks the ranks' parts: [...] -> [world_size, ...].

        out: where a part of [rows, count] is to go instead: [rows, width], rows maybe strided, of any of the float
            dtypes, width at most world_size * count: the ranks' columns one after another, cut off at width.
        """
        check_float("all_gather", "part", part)
        if out is None:
            part = part.contiguous()
            stacked = torch.empty((self.world_size, part.numel()), dtype=part.dtype, device=part.device)
            most = self._most_gathered(part.element_size())
            for start in range(0, part.numel(), most):
                piece = part.reshape(1, -1)[:, start : start + most]
                self._gather(piece, stacked[:, start:], row_stride=0, part_stride=part.numel(), width=stacked.numel())
            return stacked.view(self.world_size, *part.shape)
        rows, count = part.shape
        if out.shape[0] != rows or out.shape[1] > self.world_size * count or out.stride(-1) != 1:
            raise ValueError(
                f"all_gather: out has shape {list(out.shape)} and strides {out.stride()}, must be "
                f"[{rows}, at most {self.world_size * count}] with a dense last axis"
            )
        check_float("all_gather", "out", out)
        if part.numel():
            part = part if part.stride(1) == 1 else part.contiguous()
            most = self._most_gathered(part.element_size()) // count
            if not most:
                raise ValueError(
                    f"all_gather: rows of {count} elements do not fit buffers of {self.buffers.capacity} bytes"
                )
            for start in range(0, rows, most):
                piece, target = part[start : start + most], out[start : start + most]
                self._gather(piece, target, row_stride=out.stride(0), part_stride=count, width=out.shape[1])
        return out

    def _options(self) -> dict[str, bool]:
        return launch_early() if self._starts_early else {}

    def _most_rows(self, shots: int, row_bytes: int) -> int:
        """Rows of so many bytes that one call can reduce, see the kernels' layouts."""
        rows, ranks = self.buffers.capacity // row_bytes, self.world_size
        most = rows // ranks if shots == 1 else rows // (2 * ranks) * ranks
        if not most:
            raise ValueError(
                f"rows of {row_bytes} bytes do not fit buffers of {self.buffers.capacity} for {ranks} ranks"
            )
        return most

    def _most_gathered(self, element_size: int) -> int:
        """Elements of a rank's part that one call can gather; its pieces begin where a thread writes."""
        return self.buffers.capacity // (self.world_size * element_size) // _GATHER_TILE * _GATHER_TILE

    def _reduce(
        self,
        partial: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        normed: Tensor,
        *,
        width: int,
        eps: float,
        shots: int,
    ) -> None:
        buffers = self.buffers
        count = partial.numel()
        rows = -(-count // width)
        wide = triton.next_power_of_2(width)
        warps = max(1, min(_MAX_WARPS, wide // (32 * _THREAD_NUMBERS)))
        items = rows if shots == 1 else -(-rows // buffers.world_size)
        _KERNELS[shots][(min(items, self._max_programs),)](
            partial,
            residual,
            weight,
            partial,
            normed,
            buffers.addresses,
            buffers.state,
            buffers.error,
            buffers.report,
            buffers.rank,
            rows,
            count,
            buffers.capacity,
            self._max_looks,
            width if residual is None else residual.stride(0),
            eps,
            world_size=buffers.world_size,
            lanes=self._lanes,
            hidden=width,
            wide=wide,
            looked=min(wide, max(32, warps * 32 * _LOOKED_NUMBERS // self._lanes)),
            ragged=count % width != 0,
            bits=_bits(partial.dtype),
            num_warps=warps,
            **self._options(),
        )

    def _gather(self, part: Tensor, out: Tensor, *, row_stride: int, part_stride: int, width: int) -> None:
        buffers = self.buffers
        rows, count = part.shape
        tile = min(_GATHER_TILE, triton.next_power_of_2(count))
        items = rows * -(-count // tile)
        all_gather_kernel[(min(items, self._max_programs),)](
            part,
            out,
            buffers.addresses,
            buffers.state,
            buffers.error,
            buffers.report,
            buffers.rank,
            rows,
            count,
            width,
            part.stride(0),
            row_stride,
            part_stride,
            buffers.capacity,
            self._max_looks,
            world_size=buffers.world_size,
            lanes=self._lanes,
            tile=tile,
            bits=_bits(part.dtype),
            num_warps=max(1, min(_MAX_WARPS, tile // (32 * _THREAD_NUMBERS))),
            **self._options(),
        )


def _bits(dtype: torch.dtype) -> tl.dtype:
    return tl.int32 if dtype == torch.float32 else tl.int16


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda" or triton_interpreted():
        return 2
    return min(MAX_PROGRAMS, torch.cuda.get_device_properties(device).multi_processor_count)
