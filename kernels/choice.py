"""Which implementation of each op a rank runs: chosen once, at start, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_vlm.kernels import (
    cpp_library,
    full_attention,
    paged_attention,
    quick_gelu,
    reduce_add_norm,
    rotary,
    silu_mul,
    write_kv,
)


@dataclass(frozen=True, slots=True)
class OpSet:
    """One implementation of each op; the op's module documents its arguments.

    plan_attention: computes, once a forward, what `paged_attention` needs of the batch in every layer.
    workspace_bytes: most that an op of a forward allocates beside its results.
    """

    plan_attention: Callable[..., Any]
    paged_attention: Callable[..., Tensor]
    write_kv: Callable[..., None]
    apply_rotary: Callable[..., tuple[Tensor, Tensor]]
    silu_mul: Callable[..., Tensor]
    quick_gelu: Callable[[Tensor], Tensor]
    full_attention: Callable[..., Tensor]
    reduce_add_norm: Callable[..., tuple[Tensor, Tensor]]
    workspace_bytes: int

    @property
    def names(self) -> dict[str, str]:
        """Op -> the function that implements it, for the log."""
        ops = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: op.__name__ for name, op in ops.items() if callable(op)}


IMPLEMENTATIONS = {
    "reference": OpSet(
        plan_attention=paged_attention.plan_attention_reference,
        paged_attention=paged_attention.paged_attention_reference,
        write_kv=write_kv.write_kv_reference,
        apply_rotary=rotary.apply_rotary_reference,
        silu_mul=silu_mul.silu_mul_reference,
        quick_gelu=quick_gelu.quick_gelu_reference,
        full_attention=full_attention.full_attention_reference,
        reduce_add_norm=reduce_add_norm.reduce_add_norm_reference,
        workspace_bytes=paged_attention.TORCH_WORKSPACE_BYTES,
    ),
    "torch": OpSet(
        plan_attention=paged_attention.plan_attention_torch,
        paged_attention=paged_attention.paged_attention_torch,
        write_kv=write_kv.write_kv_torch,
        apply_rotary=rotary.apply_rotary_torch,
        silu_mul=silu_mul.silu_mul_torch,
        quick_gelu=quick_gelu.quick_gelu_torch,
        full_attention=full_attention.full_attention_torch,
        reduce_add_norm=reduce_add_norm.reduce_add_norm_torch,
        workspace_bytes=paged_attention.TORCH_WORKSPACE_BYTES,
    ),
    "cpp": OpSet(
        plan_attention=paged_attention.plan_attention_cpp,
        paged_attention=paged_attention.paged_attention_cpp,
        write_kv=write_kv.write_kv_cpp,
        apply_rotary=rotary.apply_rotary_cpp,
        silu_mul=silu_mul.silu_mul_cpp,
        quick_gelu=quick_gelu.quick_gelu_cpp,
        full_attention=full_attention.full_attention_cpp,
        reduce_add_norm=reduce_add_norm.reduce_add_norm_cpp,
        workspace_bytes=paged_attention.TORCH_WORKSPACE_BYTES,
    ),
}
DEVICES = ("cpu", "cuda")


def choose(name: str, device: torch.device | str) -> OpSet:
    """The ops a rank runs on a CPU or a GPU ("cuda"); `ValueError` for a name or device that has none.

    Compiles the C++ ops where they are named and not yet compiled: `CompileError` where that cannot be done.
    """
    kind = torch.device(device).type
    if kind not in DEVICES:
        raise ValueError(f"device is {kind!r}, must be one of {', '.join(DEVICES)}")
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"kernels is {name!r}, must be one of {', '.join(IMPLEMENTATIONS)}")
    if name == "cpp":
        if kind != "cpu":
            raise ValueError(f"kernels is 'cpp' on device {kind!r}, must be one of reference, torch there")
        cpp_library.library()
    return IMPLEMENTATIONS[name]
