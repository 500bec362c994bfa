"""The gate of a SwiGLU block: silu(gate) * up, with silu(x) = x / (1 + exp(-x)).

gate_up: [T, 2 * I], the gate in the first I columns, rows may be strided -> [T, I], of the same dtype.
Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dist_vlm.kernels import cpp_library
from dist_vlm.kernels.checks import check_rows, check_shape


def check_inputs(gate_up: Tensor) -> None:
    check_shape("silu_mul", "gate_up", gate_up, (None, None))
    check_rows("silu_mul", "gate_up", gate_up)
    if gate_up.shape[1] % 2:
        raise ValueError(f"silu_mul: gate_up has {gate_up.shape[1]} columns, must be even")


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """Computed in float32 and rounded once."""
    check_inputs(gate_up)
    size = gate_up.shape[1] // 2
    gate, up = gate_up[:, :size].float(), gate_up[:, size:].float()
    return (gate / (1.0 + (-gate).exp()) * up).to(gate_up.dtype)


def silu_mul_torch(gate_up: Tensor) -> Tensor:
    """silu is rounded to the dtype before the product, as an unfused module does."""
    check_inputs(gate_up)
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate).mul_(up)


def silu_mul_cpp(gate_up: Tensor) -> Tensor:
    """Computed in float32 and rounded once."""
    check_inputs(gate_up)
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, size))
    cpp_library.function("silu_mul", gate_up.dtype)(gate_up.data_ptr(), out.data_ptr(), rows, size, gate_up.stride(0))
    return out
