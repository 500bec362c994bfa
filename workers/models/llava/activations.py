"""The activations that a checkpoint may name: of its tower's MLPs, and of its projector.

Each is the formula that transformers has under the name, as one operation of torch where there is one: in a narrow
dtype that rounds once. Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dist_vlm.kernels.choice import OpSet

Activation = Callable[[Tensor], Tensor]

LAPLACE_MEAN, LAPLACE_DEVIATION = 0.707107, 0.282095

gelu_tanh: Activation = partial(F.gelu, approximate="tanh")


def gelu_clipped(x: Tensor) -> Tensor:
    return F.gelu(x).clamp_(-10, 10)


def laplace(x: Tensor) -> Tensor:
    """The distribution's function, by the normal one's: Ma et al., "Mega", 2023."""
    return x.sub(LAPLACE_MEAN).div_(LAPLACE_DEVIATION * math.sqrt(2.0)).erf_().add_(1.0).mul_(0.5)


def linear(x: Tensor) -> Tensor:
    return x


def relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square_()


def sqrt_softplus(x: Tensor) -> Tensor:
    return F.softplus(x).sqrt_()


# Beside "quick_gelu", an op of the rank's.
FUNCTIONS: Mapping[str, Activation] = {
    "gelu": F.gelu,
    "gelu_10": gelu_clipped,
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "hardswish": F.hardswish,
    "laplace": laplace,
    "leaky_relu": F.leaky_relu,
    "linear": linear,
    "mish": F.mish,
    "relu": F.relu,
    "relu2": relu_squared,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": sqrt_softplus,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def activation(name: str, ops: OpSet) -> Activation:
    """name: one of `config.ACTIVATIONS`."""
    return ops.quick_gelu if name == "quick_gelu" else FUNCTIONS[name]
