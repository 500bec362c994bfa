"""What each way to the ranks costs: its start, stage by stage, and beside steps of 0 to 5 ms. Prints JSON.

The ranks run no model: they decode a plan of the wanted size, sleep as long as a step is to take, and answer with one
token a slice. The cost of a step is the time it took the driver, less the time the ranks slept. With one plan in
flight it is the whole round trip; with two, what the ranks' work does not hide.

    python benchmarks/transport.py --ranks 2
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vlm.executor.base import Executor
from dist_vlm.workers import wire
from dist_vlm.workers.config import LoadReport, RankConfig
from dist_vlm.workers.pending import FinishedStep, PendingStep
from dist_vlm.workers.plan import SampledTokens, Slice, StepCounters, StepPlan, StepResult

if TYPE_CHECKING:
    import numpy as np

    from dist_vlm.workers.comm import Communicator

WARM_UP_STEPS = 20


class Echo:
    """Sleeps the microseconds that a plan has in place of a slot to release, and answers slices with their position."""

    def __init__(self, config: RankConfig, comm: Communicator) -> None:
        self.rank = config.rank

    def load(self) -> LoadReport:
        return LoadReport(self.rank, 0, 0, 0, 0, 1, 1, {}, 0)

    def allocate(self, num_blocks: int) -> None:
        pass

    def stage(self, key: str, kind: str, array: np.ndarray) -> None:
        pass

    def unstage(self, key: str) -> None:
        pass

    def launch(self, plan: StepPlan) -> PendingStep:
        began = time.perf_counter()
        if plan.release[0] > 0:
            time.sleep(plan.release[0] / 1e6)
        # A sleep takes longer than asked, so it is measured.
        counters = StepCounters(busy_us=round(1e6 * (time.perf_counter() - began)))
        sampled = tuple(SampledTokens(piece.slot, (piece.start,)) for piece in plan.slices)
        return FinishedStep(StepResult(plan.step_id, self.rank, sampled, counters=counters))


def plan_of(step_id: int, num_bytes: int, work_us: int = 0) -> StepPlan:
    """A plan of about `num_bytes`: 64 decode slices, block ids making up the rest."""
    # A block id of this size takes 5 bytes.
    ids = (100_000,) * max(0, (num_bytes - 64 * 8) // (64 * 5))
    return StepPlan(step_id, release=(work_us,), slices=tuple(Slice(slot, step_id, 1, ids, True) for slot in range(64)))


def executor_of(transport: str, ranks: int) -> Executor:
    from dist_vlm.executor.inline import InlineExecutor
    from dist_vlm.executor.ray import RayExecutor

    config = RankConfig(
        model="none",
        dtype="float32",
        device="cpu",
        load_format="dummy",
        rank=0,
        world_size=1 if transport == "inline" else ranks,
        block_size=16,
        max_model_len=4096,
        max_num_seqs=64,
        max_num_batched_tokens=64,
        gpu_memory_utilization=0.9,
        kv_cache_bytes=None,
        num_threads=1,
        kernels="reference",
        share_gpu=False,
        collectives="group",
        collectives_table=None,
        halve_step_tokens=None,
        seed=0,
        feature_cache_tokens=0,
        vision_data_parallel=False,
    )
    if transport == "inline":
        return InlineExecutor(config, runner="transport:Echo")
    return RayExecutor(config, runner="transport:Echo", transport=transport)


class Loop:
    """Steps an executor with up to `depth` plans in flight, and counts their ids."""

    def __init__(self, executor: Executor, plan_bytes: int) -> None:
        self.executor = executor
        self.plan_bytes = plan_bytes
        self.next_step = 0

    def run(self, *, steps: int, depth: int, work_us: int) -> dict[str, Any]:
        """Microseconds of a step as the driver sees it, and of the longest sleep of a rank in it."""
        plans = [plan_of(self.next_step + i, self.plan_bytes, work_us) for i in range(steps + WARM_UP_STEPS)]
        self.next_step += len(plans)
        sent: list[float] = []
        trips: list[float] = []
        busy_us: list[int] = []
        begun = 0.0
        for number, plan in enumerate(plans):
            if number == WARM_UP_STEPS:
                begun = time.perf_counter()
            sent.append(time.perf_counter())
            self.executor.submit(plan)
            if len(sent) - len(trips) >= depth:
                self.executor.collect()
                busy_us.append(max(result.counters.busy_us for result in self.executor.last_results))
                trips.append(time.perf_counter() - sent[len(trips)])
        step_us = 1e6 * (time.perf_counter() - begun) / steps
        for _ in range(depth - 1):
            self.executor.collect()
        return {"step_us": step_us, "work_us": statistics.mean(busy_us[-steps:]), "trips": trips[WARM_UP_STEPS:]}


def steps_of(executor: Executor, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Each amount of work at each depth, in turns, so that what else the machine does falls on all alike."""
    loop = Loop(executor, arguments.plan_bytes)
    points = [(work_ms, depth) for work_ms in arguments.work_ms for depth in arguments.depths]
    measured: dict[tuple[float, int], list[dict[str, Any]]] = {point: [] for point in points}
    for _ in range(arguments.rounds):
        for work_ms, depth in points:
            run = loop.run(steps=arguments.steps, depth=depth, work_us=round(1000 * work_ms))
            measured[work_ms, depth].append(run)
    rows = []
    for (work_ms, depth), runs in measured.items():
        row: dict[str, Any] = {"work_ms": work_ms, "in_flight": depth}
        row["step_us"] = round(statistics.median(run["step_us"] for run in runs), 1)
        row["cost_us"] = round(statistics.median(run["step_us"] - run["work_us"] for run in runs), 1)
        if depth == 1:
            row["round_trip"] = quantiles_us([trip for run in runs for trip in run["trips"]])
        rows.append(row)
    return rows


def quantiles_us(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "p10_us": round(1e6 * ordered[len(ordered) // 10], 1),
        "median_us": round(1e6 * statistics.median(ordered), 1),
        "p99_us": round(1e6 * ordered[int(0.99 * len(ordered))], 1),
        "max_us": round(1e6 * ordered[-1], 1),
    }


def measure(transport: str, arguments: argparse.Namespace) -> dict[str, Any]:
    executor = executor_of(transport, arguments.ranks)
    began = time.perf_counter()
    info = executor.start()
    started = time.perf_counter() - began
    try:
        rows = steps_of(executor, arguments)
    finally:
        began = time.perf_counter()
        executor.shutdown()
    return {
        "ranks": len(info.reports),
        "load_average": round(os.getloadavg()[0], 2),
        "start_s": round(started, 2),
        "start_stages_s": {stage: round(seconds, 2) for stage, seconds in info.start_seconds.items()},
        "shutdown_s": round(time.perf_counter() - began, 2),
        "steps": rows,
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


def report(arguments: argparse.Namespace) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("ray", "torch", "msgpack")}
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "software": {"python": platform.python_version(), **versions},
        "plan_bytes": len(wire.encode(plan_of(0, arguments.plan_bytes))),
        "steps_a_round": arguments.steps,
        "rounds": arguments.rounds,
        "codec": codec(arguments.plan_bytes),
        **{transport: measure(transport, arguments) for transport in arguments.transports},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the transports ray and direct")
    parser.add_argument("--steps", type=int, default=50, help="steps of one round")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of which the median is told")
    parser.add_argument("--plan-bytes", type=int, default=20_000)
    parser.add_argument("--work-ms", type=float, nargs="+", default=[0, 1, 3, 5], help="what a step takes the ranks")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2], help="plans in flight")
    choices = ["ray", "direct", "inline"]
    parser.add_argument("--transports", nargs="+", default=choices, choices=choices)
    arguments = parser.parse_args()
    # The ranks import this file by its name.
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    json.dump(report(arguments), sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
