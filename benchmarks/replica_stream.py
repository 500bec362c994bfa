"""What a replica behind Ray Serve costs beside an engine in a process of its own. Prints JSON.

Both are driven through `AsyncLLM`, over scripted ranks whose steps take no time: what is left is the step loop and the
way from the engine to the client. Told are tokens a second over all streams, the median gap between two outputs of a
stream, and the processor time of this process and its children for a thousand tokens.

    python benchmarks/replica_stream.py --checkpoint examples/demo/checkpoint --streams 1 16 64 256
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_vlm.async_llm import AsyncLLM
from dist_vlm.config import EngineConfig, resolve
from dist_vlm.launch.bench_record import git_commit, machine
from dist_vlm.launch.replica_client import ReplicaClient
from dist_vlm.sampling import SamplingParams

TOKENS = 200


async def measured(llm: AsyncLLM, num_streams: int) -> dict[str, float]:
    gaps: list[float] = []

    async def one(number: int) -> int:
        before, count = time.perf_counter(), 0
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        async for output in llm.generate(f"request {number}", params):
            now = time.perf_counter()
            if count:
                gaps.append(now - before)
            before, count = now, len(output.outputs[0].token_ids)
        return count

    began, used = time.perf_counter(), processor_s()
    counts = await asyncio.gather(*(one(number) for number in range(num_streams)))
    seconds, used = time.perf_counter() - began, processor_s() - used
    return {
        "tokens_per_s": round(sum(counts) / seconds, 1),
        "median_gap_ms": round(1e3 * statistics.median(gaps), 2),
        "processor_s_per_1000_tokens": round(1e3 * used / sum(counts), 3),
    }


def processor_s() -> float:
    """Of this process and all that it has started."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)], ticks[int(entry.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(ticks[pid] for pid in ours) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="examples/demo/checkpoint")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 256])
    arguments = parser.parse_args()
    most = max(arguments.streams)
    config = resolve(
        EngineConfig.from_fields(
            model=str(Path(arguments.checkpoint).resolve()), executor="fake", device="cpu", max_model_len=512,
            max_num_seqs=most, num_gpu_blocks_override=32 * most + 64,
        )
    )  # fmt: skip
    results: dict[str, Any] = {}
    for name, changes, client in (
        ("engine process", {"engine_process": True}, None),
        ("replica", {}, ReplicaClient),
    ):
        changed = config.replace(**changes)
        llm = AsyncLLM.from_config(changed, client=None if client is None else client(changed))
        try:
            asyncio.run(measured(llm, 4))  # warm
            results[name] = {str(count): asyncio.run(measured(llm, count)) for count in arguments.streams}
        finally:
            llm.shutdown()
    told = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "commit": git_commit(Path(__file__).parents[1]),
        "date": time.strftime("%Y-%m-%d"),
        "tokens_a_stream": TOKENS,
        "results": results,
    }
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
