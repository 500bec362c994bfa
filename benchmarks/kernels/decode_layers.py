"""All layers of a 7B model's decode step in one CUDA graph: with kernels that start early, and without.

    python benchmarks/kernels/decode_layers.py --out decode-layers.json

One rank's share of the weights at 1 and more ranks, on one GPU: the ranks' parts are not added up, and nothing is sent
to a driver. What a step takes beside the least time, in which its weights and keys and values could be read once at the
rate of a large copy; the same numbers must come out with and without.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from dist_vlm.kernels import early_start_triton
from dist_vlm.kernels.choice import choose
from dist_vlm.launch.bench_rates import measured_rates
from dist_vlm.launch.bench_record import git_commit

ROOT = Path(__file__).resolve().parents[2]

LAYERS, HIDDEN, HEADS, HEAD_DIM, MIDDLE, VOCABULARY = 32, 4096, 32, 128, 11008, 32064
BLOCK_SIZE = 16
EPS = 1e-5
DTYPE = torch.bfloat16
REPLAYS = 50


class Step:
    """Weights of one rank of `ranks`, and caches of `batch` sequences of `context` positions."""

    def __init__(self, ranks: int, batch: int, context: int) -> None:
        self.ops = choose("triton", "cuda")
        self._heads, middle = HEADS // ranks, MIDDLE // ranks
        width = self._heads * HEAD_DIM
        self.weights = [
            tuple(
                torch.randn(rows, columns, device="cuda", dtype=DTYPE) / columns**0.5
                for rows, columns in ((3 * width, HIDDEN), (HIDDEN, width), (2 * middle, HIDDEN), (HIDDEN, middle))
            )
            for _ in range(LAYERS)
        ]
        self.head = torch.randn(VOCABULARY // ranks, HIDDEN, device="cuda", dtype=DTYPE) / HIDDEN**0.5
        self._norm = torch.ones(HIDDEN, device="cuda", dtype=DTYPE)
        blocks = -(-context // BLOCK_SIZE)
        self.caches = [
            torch.randn(2, batch * blocks, BLOCK_SIZE, self._heads, HEAD_DIM, device="cuda", dtype=DTYPE)
            for _ in range(LAYERS)
        ]
        tables = torch.arange(batch * blocks, device="cuda", dtype=torch.int32).view(batch, blocks)
        slots = torch.arange(batch, device="cuda")
        contexts = torch.full((batch,), context, device="cuda")
        assert self.ops.recorded is not None
        self._plan = self.ops.recorded.plan_decode(slots, contexts, tables, block_size=BLOCK_SIZE)
        self._mapping = tables[:, -1].long() * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
        angles = torch.rand(batch, HEAD_DIM, device="cuda")
        self._cos, self._sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
        self._hidden = torch.randn(batch, HIDDEN, device="cuda", dtype=DTYPE)
        self.num_bytes = self.head.nbytes + sum(w.nbytes for layer in self.weights for w in layer)
        self.num_bytes += 2 * LAYERS * batch * context * width * DTYPE.itemsize

    def __call__(self) -> Tensor:
        ops, partial, residual = self.ops, self._hidden.clone(), None
        for (qkv, out, gate_up, down), cache in zip(self.weights, self.caches, strict=True):
            normed, residual = self._reduce(partial, residual)
            heads = ops.linear(normed, qkv, None).view(-1, 3 * self._heads, HEAD_DIM)
            q, k, v = heads.split(self._heads, dim=1)
            new = (q, k, v, self._cos, self._sin, *cache, self._mapping)
            attended = ops.attention(*new, self._plan, scale=HEAD_DIM**-0.5)
            normed, residual = self._reduce(ops.linear(attended.flatten(1), out, None), residual)
            partial = ops.linear(ops.silu_mul(ops.linear(normed, gate_up, None)), down, None)
        normed, _ = self._reduce(partial, residual)
        logits = ops.linear(normed, self.head, None)
        assert ops.recorded is not None
        ops.recorded.greedy(logits)
        return logits

    def _reduce(self, partial: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.ops.reduce_add_norm(partial, residual, self._norm, eps=EPS, all_reduce=lambda x: x)


def timed(step: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Microseconds of a replay, the median, and what the last gave."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times), result.clone()


def without_early_start(step: Callable[[], Tensor]) -> tuple[float, Tensor]:
    options = early_start_triton.options_for
    early_start_triton.options_for = lambda active: {}  # type: ignore[assignment]
    try:
        return timed(step)
    finally:
        early_start_triton.options_for = options


def measure(ranks: int, batch: int, context: int, rate: float) -> dict[str, Any]:
    """rate: bytes per second."""
    step = Step(ranks, batch, context)
    early_us, early = timed(step)
    plain_us, plain = without_early_start(step)
    if not torch.equal(early, plain):
        raise RuntimeError(f"batch {batch}, {ranks} ranks: the logits differ by {(early - plain).abs().max()}")
    return {
        "ranks": ranks,
        "batch": batch,
        "context": context,
        "least_us": round(step.num_bytes / rate * 1e6, 1),
        "early_us": round(early_us, 1),
        "plain_us": round(plain_us, 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="(1 2 4 8)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 8, 16, 32, 64], help="(1 2 8 16 32 64)")
    parser.add_argument("--context", type=int, default=128, help="positions of a sequence (128)")
    parser.add_argument("--commit", help="where the tree is no checkout")
    parser.add_argument("--out", type=Path, help="also write the figures to this file, as JSON")
    arguments = parser.parse_args(argv)
    rate = measured_rates("bfloat16").copy_bytes_per_s
    rows = []
    print(f"{torch.cuda.get_device_name()}: copy {rate / 1e12:.2f} TB/s")
    for ranks in arguments.ranks:
        for batch in arguments.batches:
            row = measure(ranks, batch, arguments.context, rate)
            rows.append(row)
            times = "  ".join(f"{kind} {row[kind + '_us']:7.1f} us" for kind in ("least", "early", "plain"))
            print(f"{ranks} ranks, batch {batch:3d}   {times}   {row['least_us'] / row['early_us']:.1%} of the least")
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": arguments.commit or git_commit(ROOT),
        "command": "benchmarks/kernels/decode_layers.py",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "gpu": torch.cuda.get_device_name(),
        "copy_tb_per_s": round(rate / 1e12, 3),
        "figures": rows,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
