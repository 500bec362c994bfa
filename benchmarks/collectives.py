"""Times of collectives on several GPUs: ours, NCCL's and torch's, beside what the link between two GPUs allows.

    python benchmarks/collectives.py --ranks 2 --out benchmarks/results/DATE-collectives-2.json

Each call is one of twenty in a CUDA graph, with a row of 4096 numbers in bfloat16 (--hidden-size, --dtype). The floor
of an all-reduce is what each rank must send at least, 2 (n - 1) / n of its part, at the rate of a copy between two
GPUs in the same run. NVLink multicast is not used, by none of them.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from dist_vlm.launch.bench_record import git_commit, machine, software
from dist_vlm.launch.collective_ranks import measure
from dist_vlm.launch.tune_collectives import text

ROOT = Path(__file__).resolve().parents[1]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--columns", type=int, help="of a rank's part of the logits (32064 / ranks)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--commit", help="in place of what git says")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    ranks = arguments.ranks
    found = measure(
        world_size=ranks,
        hidden_size=arguments.hidden_size,
        columns=arguments.columns or -(-32064 // ranks),
        dtype=arguments.dtype,
        row_counts=arguments.rows,
        others=True,
    )
    for record in found["times"]:
        parts = ranks - 1 if record["op"] == "all_gather" else 2 * (ranks - 1) / ranks
        sent = parts * record["bytes"]
        record["microseconds"]["floor"] = sent / found["link_bytes_per_s"] * 1e6
    shown = [
        {**record, "microseconds": {way: us for way, us in record["microseconds"].items() if way != "floor"}}
        for record in found["times"]
    ]
    print(f"{found['device']}, {ranks} ranks; a copy to a peer: {found['link_bytes_per_s'] / 1e9:.0f} GB/s")
    print(text(shown))
    if arguments.out is not None:
        facts = {
            "benchmark": "collectives",
            "command": f"benchmarks/collectives.py --ranks {ranks} --dtype {arguments.dtype}",
            "commit": arguments.commit or git_commit(ROOT),
            "machine": machine(),
            "software": software(),
            "ranks": ranks,
            "hidden_size": arguments.hidden_size,
            "dtype": arguments.dtype,
        }
        arguments.out.write_text(json.dumps(facts | found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
