"""Which implementation of each op a rank runs: chosen once, at start, by name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_vlm.kernels import (
    attention,
    cpp_library,
    embed,
    full_attention,
    linear,
    paged_attention,
    penalties,
    quick_gelu,
    reduce_add_norm,
    rotary_write_kv,
    sample,
    silu_mul,
)
from dist_vlm.kernels.triton_support import triton_found, triton_interpreted


@dataclass(frozen=True, slots=True)
class RecordedOps:
    """What recorded steps need beside an `OpSet`: nothing in them reads from the host.

    plan_decode, plan_tiles: `plan_attention` for single tokens, and for pieces of slots that `cut_tiles` has cut on the
    host. decode_inputs: what a decode step knows of its rows, from what the device keeps of their slots. greedy: the
    likeliest token of each row of logits, and whether the row is finite.
    """

    plan_decode: Callable[..., Any]
    plan_tiles: Callable[..., Any]
    cut_tiles: Callable[..., Sequence[tuple[int, int, int, int]]]
    decode_inputs: Callable[..., tuple[Tensor, Tensor, Tensor]]
    greedy: Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class OpSet:
    """One implementation of each op; the op's module documents its arguments.

    plan_attention: computes, once a forward, what `paged_attention` needs of the batch in every layer.
    workspace_bytes: most that an op of a forward allocates beside its results.
    recorded: None where the ops cannot be recorded.
    """

    embed: Callable[..., Tensor]
    plan_attention: Callable[..., Any]
    paged_attention: Callable[..., Tensor]
    rotary_write_kv: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    silu_mul: Callable[..., Tensor]
    quick_gelu: Callable[[Tensor], Tensor]
    full_attention: Callable[..., Tensor]
    reduce_add_norm: Callable[..., tuple[Tensor, Tensor]]
    draw: Callable[[Tensor, Sequence[sample.DrawRow]], Tensor]
    penalise: Callable[[Tensor, Tensor, Sequence[penalties.PenaltyRow]], None]
    workspace_bytes: int
    recorded: RecordedOps | None = None

    @property
    def names(self) -> dict[str, str]:
        """Op -> the function that implements it, for the log."""
        ops = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: op.__name__ for name, op in ops.items() if callable(op)}


IMPLEMENTATIONS = {
    "reference": OpSet(
        embed=embed.embed_reference,
        plan_attention=paged_attention.plan_attention_reference,
        paged_attention=paged_attention.paged_attention_reference,
        rotary_write_kv=rotary_write_kv.rotary_write_kv_reference,
        attention=attention.one_after_the_other(
            rotary_write_kv.rotary_write_kv_reference, paged_attention.paged_attention_reference
        ),
        linear=linear.linear,
        silu_mul=silu_mul.silu_mul_reference,
        quick_gelu=quick_gelu.quick_gelu_reference,
        full_attention=full_attention.full_attention_reference,
        reduce_add_norm=reduce_add_norm.reduce_add_norm_reference,
        draw=sample.draw,
        penalise=penalties.penalise,
        workspace_bytes=paged_attention.TORCH_WORKSPACE_BYTES,
    ),
    "torch": OpSet(
        embed=embed.embed_torch,
        plan_attention=paged_attention.plan_attention_torch,
        paged_attention=paged_attention.paged_attention_torch,
        rotary_write_kv=rotary_write_kv.rotary_write_kv_torch,
        attention=attention.one_after_the_other(
            rotary_write_kv.rotary_write_kv_torch, paged_attention.paged_attention_torch
        ),
        linear=linear.linear,
        silu_mul=silu_mul.silu_mul_torch,
        quick_gelu=quick_gelu.quick_gelu_torch,
        full_attention=full_attention.full_attention_torch,
        reduce_add_norm=reduce_add_norm.reduce_add_norm_torch,
        draw=sample.draw,
        penalise=penalties.penalise,
        workspace_bytes=paged_attention.TORCH_WORKSPACE_BYTES,
    ),
    "cpp": OpSet(
        embed=embed.embed_torch,
        plan_attention=paged_attention.plan_attention_cpp,
        paged_attention=paged_attention.paged_attention_cpp,
        rotary_write_kv=rotary_write_kv.rotary_write_kv_cpp,
        attention=attention.one_after_the_other(
            rotary_write_kv.rotary_write_kv_cpp, paged_attention.paged_attention_cpp
        ),
        linear=linear.linear,
        silu_mul=silu_mul.silu_mul_cpp,
        quick_gelu=quick_gelu.quick_gelu_cpp,
        full_attention=full_attention.full_attention_cpp,
        reduce_add_norm=reduce_add_norm.reduce_add_norm_cpp,
        draw=sample.draw,
        penalise=penalties.penalise,
        workspace_bytes=paged_attention.TORCH_WORKSPACE_BYTES,
    ),
}
NAMES = (*IMPLEMENTATIONS, "triton")
DEVICES = ("cpu", "cuda")


def choose(name: str, device: torch.device | str) -> OpSet:
    """The ops a rank runs on a CPU or a GPU ("cuda"); `ValueError` for a name or device that has none.

    Compiles the C++ ops where they are named and not yet compiled: `CompileError` where that cannot be done.
    """
    kind = torch.device(device).type
    if kind not in DEVICES:
        raise ValueError(f"device is {kind!r}, must be one of {', '.join(DEVICES)}")
    if name not in NAMES:
        raise ValueError(f"kernels is {name!r}, must be one of {', '.join(NAMES)}")
    allowed = allowed_names(kind)
    if name == "triton" and not triton_found():
        raise ValueError(f"kernels is 'triton' and triton cannot be imported, must be one of {', '.join(allowed)}")
    if name not in allowed:
        raise ValueError(f"kernels is {name!r} on device {kind!r}, must be one of {', '.join(allowed)} there")
    if name == "cpp":
        cpp_library.library()
    return _triton_ops() if name == "triton" else IMPLEMENTATIONS[name]


def allowed_names(kind: str) -> list[str]:
    """The implementations that a "cpu" or "cuda" device can run. Triton runs on a CPU only where it interprets."""
    fitting = {
        "reference": True,
        "torch": True,
        "cpp": kind == "cpu",
        "triton": triton_found() and (kind == "cuda" or triton_interpreted()),
    }
    return [name for name in NAMES if fitting[name]]


@functools.cache
def _triton_ops() -> OpSet:
    from dist_vlm.kernels import (
        attention_triton,
        decode_inputs_triton,
        draw_triton,
        embed_triton,
        greedy_triton,
        linear_triton,
        paged_attention_triton,
        paged_plan_triton,
        penalties_triton,
        quick_gelu_triton,
        reduce_add_norm_triton,
        rotary_write_kv_triton,
        silu_mul_triton,
    )

    return OpSet(
        embed=embed_triton.embed_triton,
        plan_attention=paged_plan_triton.plan_attention_triton,
        paged_attention=paged_attention_triton.paged_attention_triton,
        rotary_write_kv=rotary_write_kv_triton.rotary_write_kv_triton,
        attention=attention_triton.attention_triton,
        # Interpreted, one row's product with a vocabulary takes most of a minute.
        linear=linear.linear if triton_interpreted() else linear_triton.linear_triton,
        silu_mul=silu_mul_triton.silu_mul_triton,
        quick_gelu=quick_gelu_triton.quick_gelu_triton,
        full_attention=full_attention.full_attention_torch,
        reduce_add_norm=reduce_add_norm_triton.reduce_add_norm_triton,
        draw=draw_triton.draw_triton,
        penalise=penalties_triton.penalise_triton,
        workspace_bytes=paged_attention_triton.TRITON_WORKSPACE_BYTES,
        recorded=RecordedOps(
            plan_decode=paged_plan_triton.plan_decode_triton,
            plan_tiles=paged_plan_triton.plan_tiles_triton,
            cut_tiles=paged_plan_triton.cut_tiles,
            decode_inputs=decode_inputs_triton.decode_inputs_triton,
            greedy=greedy_triton.greedy_triton,
        ),
    )
