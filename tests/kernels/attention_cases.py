"""Batches for the tests of paged attention."""

from __future__ import annotations

import torch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def make_case(sequences, *, heads=4, kv_heads=2, head_dim=32, block_size=8, dtype=torch.float32, seed=0, stale=0.0):
    """sequences: (query_len, context_len). stale: value of cache positions that no sequence owns."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(count for count, _ in sequences)
    needed = [-(-context // block_size) for _, context in sequences]
    num_blocks = sum(needed) + 3
    q = torch.randn(num_tokens, heads, head_dim, generator=generator).to(dtype)
    caches = torch.full((2, num_blocks, block_size, kv_heads, head_dim), stale, dtype=dtype)
    order = torch.randperm(num_blocks, generator=generator).tolist()
    tables = torch.zeros(len(sequences), max([*needed, 1]), dtype=torch.int64)
    for index, (_, context) in enumerate(sequences):
        blocks = [order.pop() for _ in range(needed[index])]
        tables[index, : len(blocks)] = torch.tensor(blocks)
        for position in range(context):
            values = torch.randn(2, kv_heads, head_dim, generator=generator).to(dtype)
            caches[:, blocks[position // block_size], position % block_size] = values
    starts = torch.tensor([0, *(count for count, _ in sequences)]).cumsum(0)
    contexts = torch.tensor([context for _, context in sequences], dtype=torch.int64)
    return q, caches[0].clone(), caches[1].clone(), (starts, contexts, tables)


def run(plan_function, function, case, *, block_size, scale=0.2):
    q, keys, values, batch = case
    plan = plan_function(*batch, block_size=block_size, position_bytes=64)
    return function(q, keys, values, plan, scale=scale)


BATCHES = {
    "one token": [(1, 1)],
    "prefill": [(13, 13)],
    "chunk": [(5, 21)],
    "decode": [(1, 9), (1, 30), (1, 8), (1, 16)],
    "mixed": [(1, 19), (7, 7), (3, 25), (1, 1), (16, 16)],
    "gap": [(2, 9), (0, 0), (1, 4)],
}
