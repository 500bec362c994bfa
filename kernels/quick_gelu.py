"""The gate of a vision encoder's MLP: x * sigmoid(1.702 * x), elementwise.

x: any shape -> the same shape and dtype. Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vlm.kernels import cpp_library

SLOPE = 1.702


def quick_gelu_reference(x: Tensor) -> Tensor:
    """Computed in float32 and rounded once."""
    exact = x.float()
    return (exact / (1.0 + (-SLOPE * exact).exp())).to(x.dtype)


def quick_gelu_torch(x: Tensor) -> Tensor:
    """The operations of transformers' module in their order: each rounds to the dtype."""
    return x * torch.sigmoid(SLOPE * x)


def quick_gelu_cpp(x: Tensor) -> Tensor:
    """Computed in float32 and rounded once."""
    x = x.contiguous()
    out = torch.empty_like(x)
    cpp_library.function("quick_gelu", x.dtype)(x.data_ptr(), out.data_ptr(), x.numel())
    return out
