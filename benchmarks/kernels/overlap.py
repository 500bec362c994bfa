"""Whether decode attention, which waits for memory, pays beside prefill's linears, which wait for multiplications.

    python benchmarks/kernels/overlap.py --out overlap.json

Layers of the 7B shapes, each with weights and caches of its own: on one stream the linears of a prefill chunk, on
another the attention of decoding sequences; each, both in turn, and both at once as branches of one CUDA graph, with
streams of one priority and with either first. The best that overlapping could give is the longer of the two alone.

What is gained here is an UPPER BOUND of what a step would gain. Nothing here waits for the other stream before the end,
but within a layer of one batch attention needs its queries, keys and values, and the linears after it need its result:
to have both at once, a step would have to keep two batches in flight. Needs a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import triton
from elementwise import event_us
from torch import Tensor

from dist_vlm.kernels.paged_attention_triton import paged_attention_triton
from dist_vlm.kernels.paged_plan_triton import TritonPlan, plan_decode_triton
from dist_vlm.kernels.silu_mul_triton import silu_mul_triton
from dist_vlm.launch import bench_rates
from dist_vlm.launch.bench_flags import whole
from dist_vlm.launch.bench_record import git_commit

ROOT = Path(__file__).resolve().parents[2]

# Of LLaVA-1.5-7B.
HEADS, HEAD_DIM, INTERMEDIATE = 32, 128, 11008
HIDDEN = HEADS * HEAD_DIM
BLOCK_SIZE = 16
COPY_BYTES = 1 << 30
MATRIX_SIZE = 8192
TOLERANCE = 2e-2

Work = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights [out_features, in_features], and caches [blocks, BLOCK_SIZE, heads, D]."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds. linears_ms, attention_ms: each alone; `*_least_ms`: at the rate of a large product, and of a large
    copy. attention_first_ms, linears_first_ms: overlapped, with the higher priority for one of them. best_ms: the
    longer of the two alone. gained: the share of the serial time that overlapping saves with one priority."""

    tokens: int
    sequences: int
    linears_least_ms: float
    attention_least_ms: float
    linears_ms: float
    attention_ms: float
    serial_ms: float
    overlapped_ms: float
    attention_first_ms: float
    linears_first_ms: float
    best_ms: float
    gained: float


def make_layer(num_blocks: int, dtype: torch.dtype, device: torch.device) -> Layer:
    def weight(out_features: int, in_features: int) -> Tensor:
        return torch.randn(out_features, in_features, dtype=dtype, device=device).div_(in_features**0.5)

    shape = (num_blocks, BLOCK_SIZE, HEADS, HEAD_DIM)
    return Layer(
        qkv=weight(3 * HIDDEN, HIDDEN),
        out=weight(HIDDEN, HIDDEN),
        gate_up=weight(2 * INTERMEDIATE, HIDDEN),
        down=weight(HIDDEN, INTERMEDIATE),
        keys=torch.randn(shape, dtype=dtype, device=device),
        values=torch.randn(shape, dtype=dtype, device=device),
    )


def linears(layers: Sequence[Layer], hidden: Tensor, attended: Tensor) -> Tensor:
    """The last layer's result. All layers read the same rows, in place of norms, residuals and attention."""
    for layer in layers:
        F.linear(hidden, layer.qkv)
        F.linear(attended, layer.out)
        down = F.linear(silu_mul_triton(F.linear(hidden, layer.gate_up)), layer.down)
    return down


def attention(layers: Sequence[Layer], queries: Tensor, plan: TritonPlan) -> Tensor:
    """The last layer's result."""
    for layer in layers:
        attended = paged_attention_triton(queries, layer.keys, layer.values, plan, scale=queries.shape[-1] ** -0.5)
    return attended


def in_turn(first: Work, second: Work) -> Tensor:
    first()
    return second()


class Streams:
    """The streams of all graphs, made once: torch has few, and gives them out again."""

    def __init__(self) -> None:
        self.graph, self.one, self.other = (torch.cuda.Stream() for _ in range(3))
        self.first = torch.cuda.Stream(priority=-1)


def graph_ms(capturing: torch.cuda.Stream, *branches: tuple[Work, Tensor, torch.cuda.Stream]) -> float:
    """Milliseconds of a graph in which branches (work, its result, stream) run beside each other. Raises
    `AssertionError` where a result is another. A graph's kernels keep the priority of their stream."""
    for work, _, stream in branches:  # what a stream allocates once lies outside the graph
        with torch.cuda.stream(stream):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    results = []
    with torch.cuda.graph(graph, stream=capturing):
        for work, _, stream in branches:
            stream.wait_stream(capturing)
            with torch.cuda.stream(stream):
                results.append(work())
        for _, _, stream in branches:
            capturing.wait_stream(stream)
    graph.replay()
    taken_ms = event_us(graph.replay) / 1e3
    for result, (_, expected, _) in zip(results, branches, strict=True):
        torch.testing.assert_close(result, expected, atol=TOLERANCE, rtol=TOLERANCE)
    return taken_ms


def measure(
    layers: Sequence[Layer], hidden: Tensor, queries: Tensor, plan: TritonPlan, streams: Streams
) -> dict[str, float]:
    """Milliseconds of `Row`, by their names without the unit."""
    compute: Work = partial(linears, layers, hidden, torch.randn_like(hidden))
    attend: Work = partial(attention, layers, queries, plan)
    computed, attended = compute(), attend()
    torch.cuda.synchronize()
    timed = partial(graph_ms, streams.graph)
    one, other, first = streams.one, streams.other, streams.first
    return {
        "linears": timed((compute, computed, one)),
        "attention": timed((attend, attended, one)),
        "serial": timed((partial(in_turn, compute, attend), attended, one)),
        "overlapped": timed((compute, computed, one), (attend, attended, other)),
        "attention_first": timed((compute, computed, one), (attend, attended, first)),
        "linears_first": timed((compute, computed, first), (attend, attended, other)),
    }


def make_plan(tables: Tensor, context: int) -> TritonPlan:
    """Of one decode row for each of the tables [sequences, blocks]."""
    slots = torch.arange(tables.shape[0], device=tables.device)
    return plan_decode_triton(slots, torch.full_like(slots, context), tables, block_size=BLOCK_SIZE)


def show(row: Row) -> None:
    alone, both = (row.linears_ms, row.attention_ms), (row.serial_ms, row.overlapped_ms)
    figures = " ".join(
        f"{time:9.3f}" for time in (*alone, *both, row.attention_first_ms, row.linears_first_ms, row.best_ms)
    )
    print(
        f"{row.tokens:6} {row.sequences:9} {figures} {row.gained:7.1%} {1 - row.best_ms / row.serial_ms:7.1%}",
        flush=True,
    )


def report(arguments: argparse.Namespace) -> dict[str, Any]:
    device, dtype, streams = torch.device("cuda"), torch.bfloat16, Streams()
    rates = bench_rates.measure(device, "bfloat16", copy_bytes=COPY_BYTES, matrix_size=MATRIX_SIZE)
    copy_tb_per_s, matmul_tflop_per_s = rates.copy_bytes_per_s / 1e12, rates.matmul_flop_per_s / 1e12
    print(f"{torch.cuda.get_device_name()}: copy {copy_tb_per_s:.2f} TB/s, product {matmul_tflop_per_s:.0f} TFLOP/s")
    print("                    alone, ms:          both, ms:           first:")
    print("tokens sequences   linears attention    serial   overlap attention   linears      best  gained at most")
    most, blocks = max(arguments.sequences), -(-arguments.context // BLOCK_SIZE)
    layers = [make_layer(most * blocks, dtype, device) for _ in range(arguments.layers)]
    tables = torch.randperm(most * blocks, device=device).view(most, blocks).to(torch.int32)
    weights = sum(weight.numel() for layer in layers for weight in (layer.qkv, layer.out, layer.gate_up, layer.down))
    rows = []
    for tokens in arguments.tokens:
        hidden = torch.randn(tokens, HIDDEN, dtype=dtype, device=device)
        for sequences in arguments.sequences:
            queries = torch.randn(sequences, HEADS, HEAD_DIM, dtype=dtype, device=device)
            plan = make_plan(tables[:sequences], arguments.context)
            times = measure(layers, hidden, queries, plan, streams)
            kv_bytes = arguments.layers * 4 * sequences * arguments.context * HIDDEN
            row = Row(
                tokens=tokens,
                sequences=sequences,
                linears_least_ms=1e3 * 2 * tokens * weights / rates.matmul_flop_per_s,
                attention_least_ms=1e3 * kv_bytes / rates.copy_bytes_per_s,
                best_ms=max(times["linears"], times["attention"]),
                gained=1 - times["overlapped"] / times["serial"],
                **{f"{name}_ms": time for name, time in times.items()},
            )
            rows.append(row)
            show(row)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(ROOT) if arguments.commit is None else arguments.commit,
        "device": torch.cuda.get_device_name(),
        "software": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "sizes": {"layers": arguments.layers, "context": arguments.context, "block_size": BLOCK_SIZE},
        "dtype": "bfloat16",
        "copy_tb_per_s": copy_tb_per_s,
        "matmul_tflop_per_s": matmul_tflop_per_s,
        "rows": [asdict(row) for row in rows],
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=whole(1), nargs="+", default=[512, 1024, 2048], help="of a prefill chunk")
    parser.add_argument("--sequences", type=whole(1), nargs="+", default=[64, 128], help="that decode")
    parser.add_argument("--context", type=whole(1), default=704, help="positions of each")
    parser.add_argument("--layers", type=whole(1), default=8)
    parser.add_argument("--commit", help="in place of what git says")
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    arguments = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    measured = report(arguments)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
