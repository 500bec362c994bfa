"""Times `linear_triton` against torch's product for 1 to 64 rows, beside the time in which the weight could be read.

    python benchmarks/kernels/few_rows.py --out few_rows.json

Weights of the 7B shapes, bfloat16, several of each so that none is found in a cache; calls in a CUDA graph.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from dist_vlm.kernels.linear_triton import linear_triton
from dist_vlm.launch.bench_record import git_commit

ROOT = Path(__file__).resolve().parents[2]

SHAPES = {
    "query, key, value": (12288, 4096),
    "attention's output": (4096, 4096),
    "gate and up": (22016, 4096),
    "down": (4096, 11008),
    "head": (32064, 4096),
}
ROWS = (1, 2, 8, 16, 32, 64)
CALLS = 16
# More than any L2 cache holds.
WEIGHTS_BYTES = 1 << 30


def graph_us(call: Callable[[int], Any]) -> float:
    """Microseconds of one of `CALLS` calls in a graph, the best of five replays."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(CALLS):
            call(index)
    graph.replay()
    best = float("inf")
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) / CALLS * 1e3)
    return best


def copy_bytes_per_us() -> float:
    """Bytes read and written in a microsecond by a great copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_us(lambda _: target.copy_(source))


def measure(name: str, num_rows: int, rate: float) -> dict[str, Any]:
    out_features, in_features = SHAPES[name]
    num_bytes = 2 * out_features * in_features
    weights = [
        torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) / in_features**0.5
        for _ in range(max(2, WEIGHTS_BYTES // num_bytes))
    ]
    x = torch.randn(num_rows, in_features, device="cuda", dtype=torch.bfloat16)
    return {
        "weight": name,
        "rows": num_rows,
        "least_us": round(num_bytes / rate, 2),
        "triton_us": round(graph_us(lambda index: linear_triton(x, weights[index % len(weights)], None)), 2),
        "torch_us": round(graph_us(lambda index: F.linear(x, weights[index % len(weights)])), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the figures to this file, as JSON")
    arguments = parser.parse_args()
    rate = copy_bytes_per_us()
    rows = [measure(name, num_rows, rate) for name in SHAPES for num_rows in ROWS]
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(ROOT),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
        "copy_tb_per_s": round(rate / 1e6, 2),
        "figures": rows,
    }
    print(f"{record['gpu']}: copy {record['copy_tb_per_s']} TB/s")
    for row in rows:
        figures = (f"{kind} {row[kind + '_us']:6.1f} us" for kind in ("least", "triton", "torch"))
        print(f"{row['weight']:20s} {row['rows']:3d} rows ", "  ".join(figures))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
