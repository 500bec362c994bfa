"""Checks of an op's arguments. They are exceptions, so that `python -O` keeps them."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """Raises `ValueError` unless `tensor` has `shape`; None stands for any size."""
    actual = tensor.shape
    if actual == shape:
        return
    if len(actual) == len(shape):
        # A plain loop: it runs some twenty times a layer, and a generator costs several times as much.
        for have, want in zip(actual, shape, strict=True):
            if want is not None and have != want:
                break
        else:
            return
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    raise ValueError(f"{op}: {name} has shape {list(actual)}, must be [{wanted}]")


def check_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raises `TypeError` unless `tensor` has `dtype`."""
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, must be {dtype}")


def check_float(op: str, name: str, tensor: Tensor) -> None:
    """Raises `TypeError` unless `tensor` has a dtype that kernels computing in float32 take."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, must be one of {', '.join(map(str, FLOATS))}")


def check_dense(op: str, name: str, tensor: Tensor) -> None:
    """Raises `ValueError` unless `tensor` is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} has strides {tensor.stride()}, must be contiguous")


def check_rows(op: str, name: str, tensor: Tensor) -> None:
    """Raises `ValueError` unless the last axis of `tensor` is dense; earlier axes may be strided."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{op}: {name} has strides {tensor.stride()}, its last axis must be dense")
