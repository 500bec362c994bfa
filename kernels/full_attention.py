"""Attention in which every token sees every other: that of a vision encoder.

    out[n, i, h] = sum over j of softmax_j(scale * q[n, i, h] . k[n, j, h]) * v[n, j, h]

q, k, v: [N, T, heads, D] of one dtype and shape -> [N, T, heads, D]. The softmax is taken in float32. scale: above 0.
Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dist_vlm.kernels import cpp_library
from dist_vlm.kernels.checks import check_dtype, check_shape


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    op = "full_attention"
    check_shape(op, "q", q, (None, None, None, None))
    for name, tensor in (("k", k), ("v", v)):
        check_shape(op, name, tensor, tuple(q.shape))
        check_dtype(op, name, tensor, q.dtype)


def full_attention_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    check_inputs(q, k, v)
    scores = scale * torch.einsum("nihd,njhd->nhij", q.float(), k.float())
    return torch.einsum("nhij,njhd->nihd", scores.softmax(dim=-1), v.float()).to(q.dtype)


def full_attention_torch(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    check_inputs(q, k, v)
    attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return attended.transpose(1, 2)


def full_attention_cpp(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """The kernel of `paged_attention`, an image's tokens being one block."""
    check_inputs(q, k, v)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    num_images, num_tokens, heads, head_dim = q.shape
    out = torch.empty_like(q)
    if not out.numel():
        return out
    table = torch.zeros(1, dtype=torch.int64)
    prefill = cpp_library.function("prefill", q.dtype)
    sizes = (num_tokens, num_tokens, 0, head_dim, heads, heads, num_tokens, heads * head_dim, head_dim)
    for image in range(num_images):
        addresses = [x[image].data_ptr() for x in (q, k, v, out)]
        prefill(*addresses, table.data_ptr(), *sizes, scale)
    return out
