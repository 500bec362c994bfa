"""What a start of Ray ranks costs, stage by stage, and what a plan's round trip costs. Prints JSON.

The ranks run no model: they decode a plan of the wanted size and answer with one token a slice.

    python benchmarks/transport.py --ranks 2 --steps 2000
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vlm.workers import wire
from dist_vlm.workers.config import LoadReport, RankConfig
from dist_vlm.workers.plan import SampledTokens, Slice, StepPlan, StepResult

if TYPE_CHECKING:
    import numpy as np

    from dist_vlm.workers.comm import Communicator


class Echo:
    """Answers every slice with its position, after `--work-us` of sleep."""

    def __init__(self, config: RankConfig, comm: Communicator) -> None:
        self.rank = config.rank
        self.work_s = float(config.model)

    def load(self) -> LoadReport:
        return LoadReport(self.rank, 0, 0, 0, 0, 1, 1, {}, 0)

    def allocate(self, num_blocks: int) -> None:
        pass

    def stage(self, key: str, kind: str, array: np.ndarray) -> None:
        pass

    def unstage(self, key: str) -> None:
        pass

    def step(self, plan: StepPlan) -> StepResult:
        if self.work_s > 0:
            time.sleep(self.work_s)
        sampled = tuple(SampledTokens(piece.slot, (piece.start,)) for piece in plan.slices)
        return StepResult(plan.step_id, self.rank, sampled)


def plan_of(step_id: int, num_bytes: int) -> StepPlan:
    """A plan of about `num_bytes`: 64 decode slices, block ids making up the rest."""
    # A block id of this size takes 5 bytes.
    ids = (100_000,) * max(0, (num_bytes - 64 * 8) // (64 * 5))
    return StepPlan(step_id, slices=tuple(Slice(slot, step_id, 1, ids, True) for slot in range(64)))


def quantiles_us(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "p10_us": round(1e6 * ordered[len(ordered) // 10], 1),
        "median_us": round(1e6 * statistics.median(ordered), 1),
        "p99_us": round(1e6 * ordered[int(0.99 * len(ordered))], 1),
        "max_us": round(1e6 * ordered[-1], 1),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    from dist_vlm.executor.ray import RayExecutor

    config = RankConfig(
        model=str(arguments.work_us / 1e6),
        dtype="float32",
        device="cpu",
        load_format="dummy",
        rank=0,
        world_size=arguments.ranks,
        block_size=16,
        max_model_len=4096,
        max_num_seqs=64,
        max_num_batched_tokens=64,
        gpu_memory_utilization=0.9,
        kv_cache_bytes=None,
        num_threads=1,
        kernels="reference",
        share_gpu=False,
        seed=0,
    )
    executor = RayExecutor(config, runner="transport:Echo", transport=arguments.transport)
    began = time.perf_counter()
    info = executor.start()
    started = time.perf_counter() - began
    try:
        trips = round_trips(executor, arguments)
    finally:
        began = time.perf_counter()
        executor.shutdown()
    return {
        "transport": arguments.transport,
        "ranks": arguments.ranks,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_average": round(os.getloadavg()[0], 2),
        "plan_bytes": len(wire.encode(plan_of(0, arguments.plan_bytes))),
        "work_us": arguments.work_us,
        "steps": arguments.steps,
        "in_flight": arguments.in_flight,
        "start_s": round(started, 2),
        "start_stages_s": {stage: round(seconds, 2) for stage, seconds in info.start_seconds.items()},
        "shutdown_s": round(time.perf_counter() - began, 2),
        "codec": codec(arguments.plan_bytes),
        **trips,
    }


def codec(num_bytes: int) -> dict[str, float]:
    """The part of a round trip that is spent in the codec: a plan written once and read by every rank at once."""
    plan = plan_of(0, num_bytes)
    written, read = [], []
    for _ in range(200):
        began = time.perf_counter()
        data = wire.encode(plan)
        middle = time.perf_counter()
        wire.decode(StepPlan, data)
        written.append(middle - began)
        read.append(time.perf_counter() - middle)
    return {
        "encode_us": round(1e6 * statistics.median(written), 1),
        "decode_us": round(1e6 * statistics.median(read), 1),
    }


def round_trips(executor: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """From submit to collect, codec included, with up to `in_flight` plans under way."""
    plans = [plan_of(step_id, arguments.plan_bytes) for step_id in range(arguments.steps + 100)]
    sent: list[float] = []
    seconds: list[float] = []
    begun = 0.0
    for step_id, plan in enumerate(plans):
        if step_id == 100:
            begun = time.perf_counter()
        sent.append(time.perf_counter())
        executor.submit(plan)
        if len(sent) - len(seconds) >= arguments.in_flight:
            executor.collect()
            seconds.append(time.perf_counter() - sent[len(seconds)])
    per_step = (time.perf_counter() - begun) / arguments.steps
    return {"round_trip": quantiles_us(seconds[100:]), "per_step_us": round(1e6 * per_step, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--plan-bytes", type=int, default=20_000)
    parser.add_argument("--work-us", type=float, default=0.0, help="microseconds a rank sleeps in each step")
    parser.add_argument("--in-flight", type=int, default=1)
    parser.add_argument("--transport", default="ray")
    arguments = parser.parse_args()
    # The ranks import this file by its name.
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    json.dump(measure(arguments), sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
