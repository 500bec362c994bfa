"""The ops around the matrix products: Triton against torch and against the least time their bytes take. Needs a GPU.

Each op is timed in a CUDA graph over enough sets of inputs to fill the L2 cache several times where that is possible:
a short batch stays in it, as it does between the layers of a forward. The least time is that of the bytes read and
written once at the rate of a large copy, measured in the same run, and at least that of the smallest kernel in a graph.

    python benchmarks/kernels/elementwise.py --out elementwise.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from gpu_program import run
from torch import Tensor

from dist_vlm.kernels.embed import embed_torch
from dist_vlm.kernels.embed_triton import embed_triton
from dist_vlm.kernels.greedy_triton import greedy_triton
from dist_vlm.kernels.quick_gelu import quick_gelu_torch
from dist_vlm.kernels.quick_gelu_triton import quick_gelu_triton
from dist_vlm.kernels.reduce_add_norm import reduce_add_norm_torch
from dist_vlm.kernels.reduce_add_norm_triton import reduce_add_norm_triton
from dist_vlm.kernels.rotary_write_kv import rotary_write_kv_torch
from dist_vlm.kernels.rotary_write_kv_triton import rotary_write_kv_triton
from dist_vlm.kernels.sample import greedy
from dist_vlm.kernels.silu_mul import silu_mul_torch
from dist_vlm.kernels.silu_mul_triton import silu_mul_triton

COPY_BYTES = 1 << 30
COLD_BYTES = 256 << 20  # of all sets of inputs together: several times an L2 cache
MAX_SETS = 64
MIN_CALLS = 32  # in one graph
REPLAYS = 20
HOST_CALLS = 100
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Op:
    """make: the arguments of a call over T rows. num_bytes: the least it reads and writes for T rows."""

    make: Callable[[int], tuple[Any, ...]]
    num_bytes: Callable[[int], int]
    triton: Callable[..., Any]
    torch: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Row:
    """Microseconds of one call; `*_host_us` is what the call costs the thread that makes it, outside a graph."""

    op: str
    rows: int
    least_us: float
    triton_us: float
    torch_us: float
    triton_host_us: float
    torch_host_us: float


def embed_of(op: Callable[..., Tensor], ids: Tensor, table: Tensor, rows: Tensor, features: Tensor) -> Tensor:
    return op(ids, table, feature_rows=rows, features=features)


def greedy_torch(logits: Tensor) -> tuple[Tensor, Tensor]:
    return greedy(logits), logits.isfinite().all(dim=-1)


def ops_of(sizes: argparse.Namespace, device: torch.device) -> dict[str, Op]:
    hidden, middle, vocab = sizes.hidden, sizes.intermediate, sizes.vocab
    heads, kv_heads, head_dim = sizes.heads, sizes.kv_heads, sizes.head_dim
    random = partial(torch.randn, dtype=getattr(torch, sizes.dtype), device=device)
    item = torch.finfo(getattr(torch, sizes.dtype)).bits // 8
    weight, table = random(hidden), random(vocab, hidden)
    norm: dict[str, Any] = {"eps": 1e-5, "all_reduce": lambda tensor: tensor}

    def make_rotary(rows: int) -> tuple[Tensor, ...]:
        q, k, v = random(rows, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], dim=1)
        num_blocks = -(-rows // BLOCK_SIZE) + 8
        slots = torch.randperm(num_blocks * BLOCK_SIZE, device=device)[:rows]
        caches = random(2, num_blocks, BLOCK_SIZE, kv_heads, head_dim)
        return q, k, v, random(rows, head_dim), random(rows, head_dim), caches[0], caches[1], slots

    def make_embed(rows: int) -> tuple[Tensor, ...]:
        """Every second token is an image's."""
        feature_rows = torch.arange(rows, device=device) // 2
        feature_rows[::2] = -1
        return torch.randint(0, vocab, (rows,), device=device), table, feature_rows, random(max(1, rows // 2), hidden)

    return {
        "embed": Op(
            make_embed,
            lambda rows: rows * (2 * hidden * item + 16),
            partial(embed_of, embed_triton),
            partial(embed_of, embed_torch),
        ),
        "reduce_add_norm": Op(
            lambda rows: (random(rows, hidden), random(rows, hidden), weight),
            lambda rows: (4 * rows + 1) * hidden * item,
            partial(reduce_add_norm_triton, **norm),
            partial(reduce_add_norm_torch, **norm),
        ),
        "rotary_write_kv": Op(
            make_rotary,
            lambda rows: rows * ((2 * heads + 4 * kv_heads + 2) * head_dim * item + 8),
            rotary_write_kv_triton,
            rotary_write_kv_torch,
        ),
        "silu_mul": Op(
            lambda rows: (random(rows, 2 * middle),),
            lambda rows: 3 * rows * middle * item,
            silu_mul_triton,
            silu_mul_torch,
        ),
        "quick_gelu": Op(
            lambda rows: (random(rows, hidden),),
            lambda rows: 2 * rows * hidden * item,
            quick_gelu_triton,
            quick_gelu_torch,
        ),
        "greedy": Op(
            lambda rows: (torch.randn(rows, vocab, device=device),),
            lambda rows: rows * (4 * vocab + 9),
            greedy_triton,
            greedy_torch,
        ),
    }


def event_us(call: Callable[[], Any]) -> float:
    """Median over some calls of the device's time, in microseconds."""
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    return statistics.median(times)


def graph_us(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> float:
    """Microseconds of one call in a graph that makes it for all inputs in turn, each with results of its own."""
    call(*inputs[0])
    torch.cuda.synchronize()
    rounds = -(-MIN_CALLS // len(inputs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call(*arguments) for _ in range(rounds) for arguments in inputs]
    graph.replay()
    return event_us(graph.replay) / len(results)


def host_us(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    for index in range(HOST_CALLS):
        call(*inputs[index % len(inputs)])
    passed = time.perf_counter() - began
    torch.cuda.synchronize()
    return 1e6 * passed / HOST_CALLS


def copy_bytes_per_us(device: torch.device) -> float:
    """Bytes read plus bytes written in a microsecond of a large copy."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * COPY_BYTES / event_us(lambda: target.copy_(source))


def measure(name: str, op: Op, rows: int, *, rate: float, smallest_us: float) -> Row:
    num_bytes = op.num_bytes(rows)
    inputs = [op.make(rows) for _ in range(max(1, min(MAX_SETS, COLD_BYTES // num_bytes)))]
    return Row(
        name,
        rows,
        max(num_bytes / rate, smallest_us),
        graph_us(op.triton, inputs),
        graph_us(op.torch, inputs),
        host_us(op.triton, inputs),
        host_us(op.torch, inputs),
    )


def show(row: Row) -> None:
    share, gain = row.least_us / row.triton_us, row.torch_us / row.triton_us
    print(
        f"{row.op:16} {row.rows:6} {row.least_us:9.2f} {row.triton_us:9.2f} {row.torch_us:9.2f}"
        f" {share:8.0%} {gain:7.2f}x {row.triton_host_us:9.1f} {row.torch_host_us:9.1f}",
        flush=True,
    )


def report(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda")
    rate = copy_bytes_per_us(device)
    one = torch.zeros(1, device=device)
    smallest_us = graph_us(lambda tensor: tensor.add_(1), [(one,)])
    print(f"{torch.cuda.get_device_name()}: copy {rate / 1e6:.2f} TB/s, smallest kernel {smallest_us:.2f} us")
    print("op                 rows  least us triton us  torch us of least     gain host: us  torch us")
    measured = []
    for name, op in ops_of(arguments, device).items():
        if name not in arguments.ops:
            continue
        for rows in arguments.rows:
            measured.append(measure(name, op, rows, rate=rate, smallest_us=smallest_us))
            show(measured[-1])
    sizes = ("dtype", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab")
    return {
        "sizes": {size: getattr(arguments, size) for size in sizes},
        "copy_tb_per_s": rate / 1e6,
        "smallest_kernel_us": smallest_us,
        "rows": [asdict(row) for row in measured],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["embed", "reduce_add_norm", "rotary_write_kv", "silu_mul", "quick_gelu", "greedy"]
    parser.add_argument("--ops", nargs="+", default=names, choices=names)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256, 2048, 8192], help="rows of a call")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=32064)
    run(parser, report)


if __name__ == "__main__":
    main()
