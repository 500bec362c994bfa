"""Causal attention of a mixed batch (prefill chunks and decode tokens) over a block-table KV cache.

Sequence s owns the tokens [query_starts[s], query_starts[s + 1]) of the batch, n of them, and sees
c = context_lens[s] cached positions, its own tokens the last n of them. Position p lies in the cache at block
block_tables[s, p // block_size], offset p % block_size. For local token j, query head h, KV head g = h // group:

    out[j, h] = sum over p <= c - n + j of softmax_p(scale * q[j, h] . key[p, g]) * value[p, g]

q: [T, heads, D], any strides with a dense last axis; key_cache, value_cache: [num_blocks, block_size, kv_heads, D],
contiguous, of q's dtype; heads a multiple of kv_heads -> [T, heads, D]. The softmax is taken in float32.
What depends on the batch alone is computed once a forward by `plan_...` and used by every layer. It takes `bounds`
where the caller knows them: to read them from a GPU is to wait for it.
Vaswani et al., 2017; grouped heads: Ainslie et al., 2023; block tables: Kwon et al., 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dist_vlm.kernels import cpp_library
from dist_vlm.kernels.checks import check_dense, check_dtype, check_rows, check_shape

# Most bytes of keys and values that one gather of decoding sequences copies, unless one sequence alone has more.
GATHER_BYTES = 512 * 2**20
# What the torch implementation allocates beside its result: a gather, the masks, and what the torch op itself takes.
TORCH_WORKSPACE_BYTES = 2 * GATHER_BYTES


# (first token, end token, context length) of each sequence, on the host.
Bounds = Sequence[tuple[int, int, int]]


def check_batch(query_starts: Tensor, context_lens: Tensor, block_tables: Tensor, block_size: int) -> None:
    op = "plan_attention"
    num_seqs = context_lens.shape[0]
    check_shape(op, "query_starts", query_starts, (num_seqs + 1,))
    check_shape(op, "block_tables", block_tables, (num_seqs, None))
    for name, tensor in (
        ("query_starts", query_starts),
        ("context_lens", context_lens),
        ("block_tables", block_tables),
    ):
        check_dtype(op, name, tensor, torch.int64)
    if block_size < 1:
        raise ValueError(f"{op}: block_size is {block_size}, must be at least 1")


def check_inputs(q: Tensor, key_cache: Tensor, value_cache: Tensor, *, num_tokens: int, block_size: int) -> None:
    op = "paged_attention"
    head_dim = q.shape[-1]
    check_shape(op, "q", q, (num_tokens, None, head_dim))
    check_rows(op, "q", q)
    check_shape(op, "key_cache", key_cache, (None, block_size, None, head_dim))
    check_shape(op, "value_cache", value_cache, tuple(key_cache.shape))
    check_dtype(op, "key_cache", key_cache, q.dtype)
    check_dtype(op, "value_cache", value_cache, q.dtype)
    check_dense(op, "key_cache", key_cache)
    check_dense(op, "value_cache", value_cache)
    if q.shape[1] % key_cache.shape[2]:
        raise ValueError(f"{op}: {q.shape[1]} heads are not a multiple of {key_cache.shape[2]} KV heads")


def sequence_bounds(query_starts: Tensor, context_lens: Tensor, table_positions: int) -> Bounds:
    """Bounds of each sequence, which a device is waited for; raises `ValueError` where they contradict."""
    starts, contexts = query_starts.tolist(), context_lens.tolist()
    bounds = list(zip(starts[:-1], starts[1:], contexts, strict=True))
    for index, (start, end, context) in enumerate(bounds):
        if not 0 <= start <= end or not end - start <= context <= table_positions:
            raise ValueError(
                f"plan_attention: sequence {index} has tokens [{start}, {end}) and context_len {context}; must be"
                f" ascending, and the context at least the tokens and at most {table_positions} in its block table"
            )
    return bounds


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """The batch as it is, with its bounds on the host."""

    bounds: Bounds
    block_tables: Tensor
    block_size: int
    num_tokens: int


def plan_attention_reference(
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    *,
    block_size: int,
    position_bytes: int,
    bounds: Bounds | None = None,
) -> ReferencePlan:
    """Prepares the arguments that every layer shares; see the module for their meaning."""
    del position_bytes
    check_batch(query_starts, context_lens, block_tables, block_size)
    bounds = bounds or sequence_bounds(query_starts, context_lens, block_tables.shape[1] * block_size)
    return ReferencePlan(bounds, block_tables, block_size, bounds[-1][1] if bounds else 0)


def paged_attention_reference(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, plan: ReferencePlan, *, scale: float
) -> Tensor:
    check_inputs(q, key_cache, value_cache, num_tokens=plan.num_tokens, block_size=plan.block_size)
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    group = q.shape[1] // key_cache.shape[2]
    for sequence, (start, end, context) in enumerate(plan.bounds):
        table = plan.block_tables[sequence].tolist()
        places = [(table[p // plan.block_size], p % plan.block_size) for p in range(context)]
        if start == end:
            continue
        keys = torch.stack([key_cache[place] for place in places]).float()
        values = torch.stack([value_cache[place] for place in places]).float()
        for token in range(start, end):
            visible = context - (end - start) + (token - start) + 1
            for head in range(q.shape[1]):
                scores = scale * (keys[:visible, head // group] @ q[token, head].float())
                out[token, head] = torch.softmax(scores, dim=0) @ values[:visible, head // group]
    return out.to(q.dtype)


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """One sequence with several tokens.

    blocks: int64 [b], its blocks. mask: bool [n, c], what each token sees; None where c == n.
    """

    start: int
    end: int
    context: int
    blocks: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class DecodePart:
    """N sequences with one token each, padded to the blocks b of the longest.

    tokens: int64 [N]. blocks: int64 [N * b]. mask: bool [N, 1, 1, b * block_size], the positions inside the
    context. outside: int64, the rows of the gathered [N * b * block_size] positions that lie past a context: they
    belong to nobody, or to another sequence, and are zeroed so that no value of theirs, NaN included, is used.
    """

    tokens: Tensor
    blocks: Tensor
    mask: Tensor
    outside: Tensor


@dataclass(frozen=True, slots=True)
class TorchPlan:
    prefills: tuple[PrefillPart, ...]
    decodes: tuple[DecodePart, ...]
    block_size: int
    num_tokens: int


def plan_attention_torch(
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    *,
    block_size: int,
    position_bytes: int,
    bounds: Bounds | None = None,
) -> TorchPlan:
    """Prepares the arguments that every layer shares; reads the bounds on the host, once a forward.

    position_bytes: of the keys and values of one position in one layer of this rank.
    """
    check_batch(query_starts, context_lens, block_tables, block_size)
    bounds = bounds or sequence_bounds(query_starts, context_lens, block_tables.shape[1] * block_size)
    prefills, singles = [], []
    for sequence, (start, end, context) in enumerate(bounds):
        if end - start == 1:
            singles.append((context, start, sequence))
        elif end > start:
            prefills.append(_prefill_part(start, end, context, block_tables[sequence], block_size))
    parts = _split_singles(sorted(singles), GATHER_BYTES // position_bytes)
    decodes = tuple(_decode_part(part, block_tables, block_size) for part in parts)
    return TorchPlan(tuple(prefills), decodes, block_size, bounds[-1][1] if bounds else 0)


def _prefill_part(start: int, end: int, context: int, table: Tensor, block_size: int) -> PrefillPart:
    blocks = table[: _ceil_div(context, block_size)]
    return PrefillPart(start, end, context, blocks, _causal_mask(end - start, context, blocks.device))


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _causal_mask(num_tokens: int, context: int, device: torch.device) -> Tensor | None:
    if num_tokens == context:
        return None
    mask = torch.ones(num_tokens, context, dtype=torch.bool, device=device)
    return mask.tril_(context - num_tokens)


def _split_singles(singles: list[tuple[int, int, int]], budget: int) -> list[list[tuple[int, int, int]]]:
    """Cuts (context, token, sequence), ascending by context, into parts whose padded size is within the budget."""
    parts: list[list[tuple[int, int, int]]] = []
    for single in singles:
        if parts and (len(parts[-1]) + 1) * single[0] <= budget:
            parts[-1].append(single)
        else:
            parts.append([single])
    return parts


def _decode_part(part: list[tuple[int, int, int]], block_tables: Tensor, block_size: int) -> DecodePart:
    contexts, tokens, sequences = torch.tensor(part, dtype=torch.int64).to(block_tables.device).unbind(1)
    num_blocks = _ceil_div(part[-1][0], block_size)
    blocks = block_tables[sequences, :num_blocks]
    positions = torch.arange(num_blocks * block_size, device=block_tables.device)
    inside = positions[None, :] < contexts[:, None]
    outside = (~inside).flatten().nonzero().squeeze(1)
    return DecodePart(tokens, blocks.flatten(), inside[:, None, None, :], outside)


def paged_attention_torch(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, plan: TorchPlan, *, scale: float
) -> Tensor:
    """One scaled_dot_product_attention a prefilling sequence and one for each part of the decoding ones."""
    check_inputs(q, key_cache, value_cache, num_tokens=plan.num_tokens, block_size=plan.block_size)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for prefill in plan.prefills:
        out[prefill.start : prefill.end] = _attend_prefill(q, key_cache, value_cache, prefill, scale)
    for decode in plan.decodes:
        attended = _attend_decode(q, key_cache, value_cache, decode, scale)
        out.index_copy_(0, decode.tokens, attended)
    return out


def _gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """-> [len(blocks) * block_size, kv_heads, D], a copy."""
    return cache.flatten(1).index_select(0, blocks).view(-1, *cache.shape[2:])


def _attend_prefill(q: Tensor, key_cache: Tensor, value_cache: Tensor, part: PrefillPart, scale: float) -> Tensor:
    kv_heads = key_cache.shape[2]
    queries = q[part.start : part.end].transpose(0, 1).unflatten(0, (kv_heads, -1))  # [kv_heads, group, n, D]
    keys = _gather(key_cache, part.blocks)[: part.context].transpose(0, 1).unsqueeze(1)  # [kv_heads, 1, c, D]
    values = _gather(value_cache, part.blocks)[: part.context].transpose(0, 1).unsqueeze(1)
    attended = F.scaled_dot_product_attention(
        queries,
        keys.expand(-1, queries.shape[1], -1, -1),  # a view: the group shares one copy
        values.expand(-1, queries.shape[1], -1, -1),
        attn_mask=part.mask,
        is_causal=part.mask is None,
        scale=scale,
    )
    return attended.flatten(0, 1).transpose(0, 1)


def _attend_decode(q: Tensor, key_cache: Tensor, value_cache: Tensor, part: DecodePart, scale: float) -> Tensor:
    num_seqs, kv_heads, head_dim = part.tokens.shape[0], key_cache.shape[2], q.shape[2]
    queries = q.index_select(0, part.tokens).view(num_seqs, kv_heads, -1, head_dim)  # a group's heads as tokens
    keys = _gather(key_cache, part.blocks).index_fill_(0, part.outside, 0)
    values = _gather(value_cache, part.blocks).index_fill_(0, part.outside, 0)
    attended = F.scaled_dot_product_attention(
        queries,
        keys.view(num_seqs, -1, kv_heads, head_dim).transpose(1, 2),
        values.view(num_seqs, -1, kv_heads, head_dim).transpose(1, 2),
        attn_mask=part.mask,
        scale=scale,
    )
    return attended.reshape(num_seqs, -1, head_dim)


@dataclass(frozen=True, slots=True)
class CppPlan:
    """prefills: (first token, end token, context length, sequence) of each with several tokens. tokens, sequences,
    contexts: int64 [N], the sequences with one token, the longest first. block_tables: int64 [S, blocks], dense.
    blocks: the range that the block ids used lie in."""

    prefills: tuple[tuple[int, int, int, int], ...]
    tokens: Tensor
    sequences: Tensor
    contexts: Tensor
    block_tables: Tensor
    blocks: range
    block_size: int
    num_tokens: int


def plan_attention_cpp(
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    *,
    block_size: int,
    position_bytes: int,
    bounds: Bounds | None = None,
) -> CppPlan:
    """Prepares the arguments that every layer shares."""
    del position_bytes
    check_batch(query_starts, context_lens, block_tables, block_size)
    bounds = bounds or sequence_bounds(query_starts, context_lens, block_tables.shape[1] * block_size)
    prefills, singles = [], []
    for sequence, (start, end, context) in enumerate(bounds):
        if end - start == 1:
            singles.append((context, start, sequence))
        elif end > start:
            prefills.append((start, end, context, sequence))
    singles.sort(reverse=True)
    contexts, tokens, sequences = torch.tensor(singles, dtype=torch.int64).view(-1, 3).T.contiguous()
    ids = block_tables[torch.arange(block_tables.shape[1]) * block_size < context_lens.unsqueeze(1)]
    return CppPlan(
        prefills=tuple(prefills),
        tokens=tokens,
        sequences=sequences,
        contexts=contexts,
        block_tables=block_tables.contiguous(),
        blocks=range(int(ids.min()), int(ids.max()) + 1) if ids.shape[0] else range(0),
        block_size=block_size,
        num_tokens=bounds[-1][1] if bounds else 0,
    )


def paged_attention_cpp(q: Tensor, key_cache: Tensor, value_cache: Tensor, plan: CppPlan, *, scale: float) -> Tensor:
    """Reads the cache where it lies; products and sums in float32, rounded once. scale: above 0."""
    check_inputs(q, key_cache, value_cache, num_tokens=plan.num_tokens, block_size=plan.block_size)
    if plan.blocks.start < 0 or plan.blocks.stop > key_cache.shape[0]:
        raise IndexError(f"paged_attention: block ids {plan.blocks} are not all inside {key_cache.shape[0]} blocks")
    out = torch.empty(q.shape, dtype=q.dtype)
    _, heads, head_dim = q.shape
    sizes = (head_dim, heads, key_cache.shape[2], plan.block_size)
    caches = (key_cache.data_ptr(), value_cache.data_ptr())
    if plan.prefills:
        prefill = cpp_library.function("prefill", q.dtype)
        for start, end, context, sequence in plan.prefills:
            addresses = (q[start].data_ptr(), *caches, out[start].data_ptr(), plan.block_tables[sequence].data_ptr())
            prefill(*addresses, end - start, context, 1, *sizes, q.stride(0), q.stride(1), scale)
    if plan.tokens.shape[0]:
        shared = (plan.tokens, plan.sequences, plan.contexts, plan.block_tables)
        cpp_library.function("decode", q.dtype)(
            q.data_ptr(),
            *caches,
            out.data_ptr(),
            *(tensor.data_ptr() for tensor in shared),
            plan.tokens.shape[0],
            *sizes,
            plan.block_tables.stride(0),
            q.stride(0),
            q.stride(1),
            scale,
        )
    return out
