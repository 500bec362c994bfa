"""The product of 2 to 64 rows with a weight, on a GPU with a tensor memory accelerator (TMA, since Hopper).

It takes as long as the weight takes to be read. The accelerator fetches whole tiles of it into shared memory, some of
them ahead of those that the matrix units work on; a program computes no addresses, and holds few registers.
NVIDIA, "CUDA C++ Programming Guide", Asynchronous Data Copies using the Tensor Memory Accelerator.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from dist_vlm.kernels.early_start_triton import await_previous, launch_late, start_next
from dist_vlm.kernels.triton_support import triton_interpreted

# Rows that a kernel is compiled for; matrix units multiply no fewer at once.
ROW_SIZES = (8, 16, 32, 64)
MAX_ROWS = ROW_SIZES[-1]
# Compute capabilities 9.x and 10.x, which have the accelerator and 227 KiB of shared memory for a program.
_GENERATIONS = (9, 10)
# Bytes that addresses and steps from row to row are multiples of.
_ALIGNMENT = 16
_DTYPES = (torch.bfloat16, torch.float16)
# Outputs of a program, and the programs that an H200 runs at once if each takes a multiprocessor.
_OUTPUTS, _MULTIPROCESSORS = 64, 132


@dataclass(frozen=True, slots=True)
class Tiles:
    """tile: numbers of a row fetched together. stages: tiles in shared memory at once."""

    tile: int
    stages: int


def tiles_for(num_rows: int, out_features: int) -> Tiles:
    """Where many multiprocessors are left without a program, each program has much of the weight on its way. Of many
    programs two or three fit into one multiprocessor, so that all run at once; with more rows fewer do.

    Measured on an H200 in whole decode steps of a 7B model, at the share of 1, 2, 4 and 8 ranks up to 16 rows, of one
    rank beyond: benchmarks/results/2026-11-30-h200-few-rows.json.
    """
    load = out_features / (_OUTPUTS * _MULTIPROCESSORS)
    if load <= 2 / 3:
        return Tiles(256, 5) if num_rows <= 16 else Tiles(128, 8) if num_rows <= 32 else Tiles(128, 5)
    if load <= 4 / 3 or (num_rows > 32 and load > 2):
        return Tiles(128, 5)
    return Tiles(128, 3)


@functools.cache
def _can(active: Any) -> bool:
    target = active.get_current_target()
    return target.backend == "cuda" and target.arch // 10 in _GENERATIONS


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `few_rows` can multiply these: x of any leading axes and [in_features], weight [out_features,
    in_features], of one dtype."""
    if not triton_interpreted() and not _can(driver.active):
        return False
    aligned = (x.data_ptr() | weight.data_ptr()) % _ALIGNMENT == 0
    whole = (weight.shape[1] * x.itemsize) % _ALIGNMENT == 0 and (weight.stride(0) * x.itemsize) % _ALIGNMENT == 0
    return aligned and whole and weight.shape[0] > 0 and x.dtype in _DTYPES


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tiles) -> Tensor:
    """x: what `takes` takes, of 2 to 64 rows, contiguous. Returns x's leading axes and [out_features], of its dtype."""
    out_features, in_features = weight.shape
    num_rows = x.numel() // in_features
    rows = next(size for size in ROW_SIZES if size >= num_rows)
    out = x.new_empty((*x.shape[:-1], out_features))
    _few_rows_kernel[(triton.cdiv(out_features, _OUTPUTS),)](
        TensorDescriptor(x, [num_rows, in_features], [in_features, 1], [rows, tiles.tile]),
        TensorDescriptor(weight, [out_features, in_features], [weight.stride(0), 1], [_OUTPUTS, tiles.tile]),
        bias,
        out,
        num_rows,
        out_features,
        in_features=in_features,
        rows=rows,
        outputs=_OUTPUTS,
        tile=tiles.tile,
        stages=tiles.stages,
        num_warps=4,
        **launch_late(),
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows_kernel(
    x,
    weight,
    bias,
    out,
    num_rows,
    out_features,
    in_features: tl.constexpr,
    rows: tl.constexpr,
    outputs: tl.constexpr,
    tile: tl.constexpr,
    stages: tl.constexpr,
    early: tl.constexpr = False,
):
    start_next(early)
    await_previous(early)
    first = tl.program_id(0) * outputs
    # The weight stands on the left: its rows are many, and those of x the few that the matrix units want on the right.
    # What lies outside of either is fetched as zeros.
    acc = tl.zeros((outputs, rows), tl.float32)
    for start in tl.range(0, in_features, tile, num_stages=stages):
        acc = tl.dot(weight.load([first, start]), tl.trans(x.load([0, start])), acc)
    output, row = first + tl.arange(0, outputs), tl.arange(0, rows)
    if bias is not None:
        acc += tl.load(bias + output, mask=output < out_features, other=0.0).to(tl.float32)[:, None]
    place = out + row[None, :] * out_features + output[:, None]
    tl.store(place, acc.to(out.dtype.element_ty), mask=(row < num_rows)[None, :] & (output < out_features)[:, None])
