"""Kernels that start before the one before them has ended: programmatic dependent launch, of GPUs since Hopper.

Between two kernels of a stream the device is idle while the last programs of one end and the first of the next start:
half a microsecond, and as long again until a kernel reads memory at full speed, some three hundred times a decode step.
A kernel that starts early spends that time with what does not depend on the kernels before it, such as its weights.

Each kernel calls `start_next` first, and `await_previous` before it reads what a kernel has written, or writes at all.
Not even what was written long ago may be read before: when all kernels start early, none of those before is sure to
have ended. `await_previous` returns when the one before has, which itself has awaited its own.
NVIDIA, "CUDA C++ Programming Guide", Programmatic Dependent Launch and Synchronization.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import driver

from dist_vlm.kernels.triton_support import triton_interpreted

_FIRST_CAPABILITY = 90


def launch_early() -> dict[str, bool]:
    """Options of a launch: `early` for the kernel, and what Triton needs."""
    return {} if triton_interpreted() else options_for(driver.active)


def launch_late() -> dict[str, bool]:
    """Options of a kernel that lets the next one start early, and starts itself when the one before has ended: one
    whose programs take so much of a multiprocessor's memory that they would be in the way."""
    return {name: value for name, value in launch_early().items() if name == "early"}


@functools.cache
def options_for(active: Any) -> dict[str, bool]:
    target = active.get_current_target()
    can = target.backend == "cuda" and target.arch >= _FIRST_CAPABILITY
    return {"early": True, "launch_pdl": True} if can else {}


@triton.jit
def start_next(early: tl.constexpr):
    """Lets the next kernel start as soon as all programs of this one have, and there is room for it."""
    if early:
        gdc_launch_dependents()


@triton.jit
def await_previous(early: tl.constexpr):
    """Waits until the kernel before has ended, and for all that it wrote."""
    if early:
        gdc_wait()
