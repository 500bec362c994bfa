"""Rotary position embedding of queries and keys, rotating halves.

With R = rotary_dim, x1 = x[..., :R/2], x2 = x[..., R/2:R]:

    y[..., :R/2]  = x1 * cos[:, :R/2]  - x2 * sin[:, :R/2]
    y[..., R/2:R] = x2 * cos[:, R/2:]  + x1 * sin[:, R/2:]
    y[..., R:]    = x[..., R:]

q: [T, heads, D], k: [T, kv_heads, D], any strides; cos, sin: [T, R], R even, R <= D, of q's dtype.
Su et al., "RoFormer", 2021, in the half-rotation order of GPT-NeoX.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vlm.kernels import cpp_library
from dist_vlm.kernels.checks import check_dtype, check_shape


def check_inputs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    op = "apply_rotary"
    num_tokens, _, head_dim = q.shape
    rotary_dim = cos.shape[-1]
    check_shape(op, "k", k, (num_tokens, None, head_dim))
    check_shape(op, "cos", cos, (num_tokens, None))
    check_shape(op, "sin", sin, (num_tokens, rotary_dim))
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise ValueError(f"{op}: rotary_dim is {rotary_dim}, must be even and at most head_dim {head_dim}")
    for name, tensor in (("k", k), ("cos", cos), ("sin", sin)):
        check_dtype(op, name, tensor, q.dtype)


def apply_rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rotated copies of q and k, computed in float32 and rounded once."""
    check_inputs(q, k, cos, sin)
    return _rotate_float32(q, cos, sin), _rotate_float32(k, cos, sin)


def _rotate_float32(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1] // 2
    y = x.float().clone()
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    for token in range(x.shape[0]):
        c, s = cos[token].float(), sin[token].float()
        y[token, :, :half] = first[token] * c[:half] - second[token] * s[:half]
        y[token, :, half : 2 * half] = second[token] * c[half:] + first[token] * s[half:]
    return y.to(x.dtype)


def apply_rotary_torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rotated copies of q and k; every product and sum is rounded to q's dtype."""
    check_inputs(q, k, cos, sin)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary_dim = cos.shape[-1]
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    turned = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)


def apply_rotary_cpp(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rotated copies of q and k, computed in float32 and rounded once."""
    check_inputs(q, k, cos, sin)
    cos, sin = cos.contiguous(), sin.contiguous()
    rotate = cpp_library.function("rotary", q.dtype)
    turned = []
    for x in (q, k):
        x = x if x.stride(2) == 1 else x.contiguous()
        out = torch.empty(x.shape, dtype=x.dtype)
        addresses = (x.data_ptr(), out.data_ptr(), cos.data_ptr(), sin.data_ptr())
        rotate(*addresses, *x.shape, cos.shape[1], x.stride(0), x.stride(1))
        turned.append(out)
    return turned[0], turned[1]
