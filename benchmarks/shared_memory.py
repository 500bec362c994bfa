"""What a collective of CPU ranks costs over shared memory and over gloo, in one run. Prints a table; --out writes JSON.

Every rank is a process of one thread. A round runs each way once, some calls in a row, one way after the other; the
time of a call is the median over the rounds, on rank 0. "norm" is the sum over the ranks with residual add and RMSNorm.

    python benchmarks/shared_memory.py --ranks 2
    python benchmarks/shared_memory.py --ranks 4 --crossover      one shot against two, by size: no gloo
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
import uuid
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

SHAPES = ((1, 768), (4, 768), (16, 768), (64, 768), (256, 768), (1, 4096), (16, 4096), (256, 4096))
CROSSOVER_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CROSSOVER_HIDDEN = 1024
DTYPES = ("bfloat16", "float32")
EPS = 1e-6
TIMEOUT_S = 60.0
NEVER = 1 << 60


def median_microseconds(ways: dict[str, Callable[[], Any]], rounds: int, calls: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            way()  # the ranks leave it together, and its buffers are warm
            began = time.perf_counter()
            for _ in range(calls):
                way()
            taken[name].append((time.perf_counter() - began) / calls * 1e6)
    return {name: statistics.median(values[len(values) // 10 :]) for name, values in taken.items()}


def compare(group: Any, comm: Any, rounds: int) -> list[dict[str, Any]]:
    import torch

    from dist_vlm.kernels.reduce_add_norm import reduce_add_norm_cpp

    results = []
    for dtype in DTYPES:
        for rows, hidden in SHAPES:
            partial = torch.zeros(rows, hidden, dtype=getattr(torch, dtype))
            residual = torch.randn(rows, hidden).to(partial.dtype)
            weight = torch.rand(hidden).to(partial.dtype)
            args = (partial, residual, weight)
            ways = {
                "gloo all_reduce": lambda x=partial: comm.all_reduce(x),
                "all_reduce": lambda x=partial: group.all_reduce(x),
                "gloo norm": lambda a=args: reduce_add_norm_cpp(*a, eps=EPS, all_reduce=comm.all_reduce),
                "unfused norm": lambda a=args: reduce_add_norm_cpp(*a, eps=EPS, all_reduce=group.all_reduce),
                "norm": lambda a=args: group.reduce_add_norm(*a, eps=EPS),
                "gloo all_gather": lambda x=partial: comm.all_gather(x),
                "all_gather": lambda x=partial: group.all_gather(x),
            }
            calls = 20 if rows * hidden < 50_000 else 4
            times = median_microseconds(ways, rounds, calls)
            results.append({"dtype": dtype, "rows": rows, "hidden": hidden, "us": times})
    return results


def find_crossover(group: Any, rounds: int) -> list[dict[str, Any]]:
    import torch

    results = []
    for dtype in DTYPES:
        for rows in CROSSOVER_ROWS:
            partial = torch.zeros(rows, CROSSOVER_HIDDEN, dtype=getattr(torch, dtype))
            residual = torch.randn(rows, CROSSOVER_HIDDEN).to(partial.dtype)
            weight = torch.rand(CROSSOVER_HIDDEN).to(partial.dtype)

            def call(threshold: int, fused: bool, args: Any = (partial, residual, weight)) -> None:
                group.set_crossover(threshold, threshold)
                if fused:
                    group.reduce_add_norm(*args, eps=EPS)
                else:
                    group.all_reduce(args[0])

            ways = {
                f"{'norm' if fused else 'all_reduce'} {shots}": lambda t=t, f=fused, call=call: call(t, f)
                for fused in (False, True)
                for shots, t in (("one shot", NEVER), ("two shots", 0))
            }
            times = median_microseconds(ways, rounds, 20 if rows < 64 else 4)
            results.append({"dtype": dtype, "rows": rows, "hidden": CROSSOVER_HIDDEN, "us": times})
    return results


def run_rank(rank: int, args: argparse.Namespace, name: str, port: Queue[int], out: Queue[Any]) -> None:
    import torch

    from dist_vlm.kernels.shared_memory import SharedMemoryGroup
    from dist_vlm.workers.comm import host_store, join_group, join_store

    torch.set_num_threads(1)
    capacity = {} if args.capacity is None else {"capacity_bytes": args.capacity}
    group = SharedMemoryGroup(rank=rank, world_size=args.ranks, name=name, timeout_s=TIMEOUT_S, **capacity)
    if args.crossover:
        results = find_crossover(group, args.rounds)
    else:
        if rank == 0:
            store = host_store("127.0.0.1", args.ranks, TIMEOUT_S)
            for _ in range(args.ranks - 1):
                port.put(store.port)
        else:
            store = join_store("127.0.0.1", port.get(timeout=TIMEOUT_S), args.ranks, TIMEOUT_S)
        comm = join_group(
            store, rank=rank, world_size=args.ranks, backend="gloo", timeout_s=TIMEOUT_S, host="127.0.0.1"
        )
        results = compare(group, comm, args.rounds)
        comm.close()
    group.close()
    if rank == 0:
        out.put({"torch": torch.__version__, "results": results})


def print_table(results: list[dict[str, Any]]) -> None:
    names = list(results[0]["us"])
    print(f"{'dtype':9} {'shape':>9} {'bytes':>8} " + " ".join(f"{name:>15}" for name in names) + "  (us a call)")
    for row in results:
        size = row["rows"] * row["hidden"] * (4 if row["dtype"] == "float32" else 2)
        times = " ".join(f"{row['us'][name]:15.1f}" for name in names)
        print(f"{row['dtype']:9} {row['rows']:4}x{row['hidden']:<4} {size:8} {times}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--capacity", type=int, help="bytes of a slot (default: the library's)")
    parser.add_argument("--crossover", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    port: Any = context.Queue()
    out: Any = context.Queue()
    name = f"dist-vlm-benchmark-{uuid.uuid4().hex}"
    ranks = [context.Process(target=run_rank, args=(r, args, name, port, out), daemon=True) for r in range(args.ranks)]
    for process in ranks:
        process.start()
    measured = out.get(timeout=600)
    for process in ranks:
        process.join(timeout=30)
    print_table(measured["results"])
    if args.out:
        machine = {"cores": len(os.sched_getaffinity(0)), "processor": platform.processor() or platform.machine()}
        args.out.write_text(json.dumps({"ranks": args.ranks, **machine, **measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
