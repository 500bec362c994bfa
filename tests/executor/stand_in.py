"""A runner without a model, for tests of how plans travel. It misbehaves as its config's `model` asks, in JSON:

{"fault": {"rank": 1, "at": "load" | "allocate" | "construct" | "stage" | <step id>, "do": what}}

with `do` one of "raise" (FileNotFoundError), "exit", "hang" (asleep), "differ" (a step answers otherwise), or
"slow" (a step sleeps 0.3 s). {"late": true} in a step's fault: while its result is waited for, not at its launch.
{"collective": true} makes each step sum the ranks over the group. {"work_s": 0.005}: each step sleeps so long.
{"deferred": [0, 1]}: the ranks whose steps run beside the launches, one after the other, as on a GPU, and are never
ready before their result is asked for. {"answer_tokens": 1000}: each step answers with so many tokens more.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dist_vlm.workers.config import LoadReport, RankConfig
from dist_vlm.workers.pending import FinishedStep, PendingStep
from dist_vlm.workers.plan import SampledTokens, StepCounters, StepPlan, StepResult

if TYPE_CHECKING:
    import numpy as np

    from dist_vlm.workers.comm import Communicator

RUNNER = f"{__name__.rpartition('.')[2]}:StandIn"


def rank_config(world_size: int = 1, model: dict[str, Any] | None = None, **changes: Any) -> RankConfig:
    values: dict[str, Any] = {
        "model": json.dumps(model or {}),
        "dtype": "float32",
        "device": "cpu",
        "load_format": "dummy",
        "rank": 0,
        "world_size": world_size,
        "block_size": 16,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "gpu_memory_utilization": 0.9,
        "kv_cache_bytes": None,
        "num_threads": 1,
        "kernels": "reference",
        "share_gpu": False,
        "collectives": "group",
        "collectives_table": None,
        "halve_step_tokens": None,
        "seed": 0,
        "feature_cache_tokens": 256,
        "vision_data_parallel": True,
    }
    return RankConfig(**(values | changes))


class DeferredStep:
    """Ends at a time of the monotonic clock, and does not say so."""

    def __init__(self, end: float, finish: Callable[[], StepResult]) -> None:
        self.end, self.finish = end, finish

    def ready(self) -> bool:
        return False

    def result(self) -> StepResult:
        time.sleep(max(0.0, self.end - time.monotonic()))
        return self.finish()


class StandIn:
    """Reports 100 + 10 * rank blocks; a slot's token is 1000 * slot + its position, plus what the group summed."""

    def __init__(self, config: RankConfig, comm: Communicator) -> None:
        self.config, self.comm = config, comm
        wanted = json.loads(config.model)
        fault = wanted.get("fault", {})
        self.fault = fault if fault.get("rank", 0) == config.rank else {}
        self.collective = wanted.get("collective", False)
        self.work_s = wanted.get("work_s", 0.0)
        self.deferred = config.rank in wanted.get("deferred", [])
        self.answer_tokens = wanted.get("answer_tokens", 0)
        self.end = 0.0
        self.images: dict[str, float] = {}
        self.processors: dict[str, tuple[Callable[..., Any], ...]] = {}
        self.wanted_processors: dict[int, str] = {}
        self.num_blocks = 0
        self._maybe_fail("construct")

    def load(self) -> LoadReport:
        self._maybe_fail("load")
        return LoadReport(
            rank=self.config.rank,
            num_language_parameters=1,
            num_vision_parameters=2,
            weight_bytes=12,
            peak_load_bytes=12,
            kv_block_bytes=64,
            num_blocks=100 + 10 * self.config.rank,
            kernels={"none": "none"},
            load_us=1,
        )

    def allocate(self, num_blocks: int) -> None:
        self._maybe_fail("allocate")
        self.num_blocks = num_blocks

    def stage(self, key: str, kind: str, array: np.ndarray) -> None:
        self._maybe_fail("stage")
        if array.flags.writeable:
            raise ValueError("the staged array is writable: it is not shared memory")
        self.images[key] = float(array.sum())

    def unstage(self, key: str) -> None:
        del self.images[key]

    def launch(self, plan: StepPlan) -> PendingStep:
        """An image in `encode` adds its sum to every token, so the answer shows that it arrived."""
        if not self.fault.get("late"):
            self._maybe_fail(plan.step_id)
        result = self._compute(plan)
        if self.deferred:
            self.end = max(time.monotonic(), self.end) + self.work_s
            return DeferredStep(self.end, lambda: self._finish(result))
        if self.work_s > 0:
            time.sleep(self.work_s)
        return FinishedStep(self._finish(result))

    def _finish(self, result: StepResult) -> StepResult:
        if self.fault.get("late"):
            self._maybe_fail(result.step_id)
        return result

    def _compute(self, plan: StepPlan) -> StepResult:
        extra = int(sum(self.images[key] for key in plan.encode)) + self._sum_over_ranks()
        if self.fault.get("do") == "differ" and self.fault["at"] == plan.step_id:
            extra += 1
        self.wanted_processors |= {new.slot: new.sampling.processors for new in plan.new}
        sampled = [
            SampledTokens(piece.slot, (self._processed(piece.slot, piece.start + piece.count + extra),))
            for piece in plan.slices
            if piece.sample
        ]
        if self.answer_tokens:
            sampled.append(SampledTokens(self.config.max_num_seqs, (100_000,) * self.answer_tokens))
        counters = StepCounters(num_collectives=self.comm.count.total, busy_us=os.getpid())
        return StepResult(plan.step_id, self.config.rank, tuple(sampled), counters=counters)

    def _processed(self, slot: int, position: int) -> int:
        token = 1000 * slot + position
        for processor in self.processors.get(self.wanted_processors.get(slot, ""), ()):
            token = processor(token)
        return token

    def _sum_over_ranks(self) -> int:
        if not self.collective:
            return 0
        import torch

        return int(self.comm.all_reduce(torch.tensor([self.config.rank + 1.0])).item())

    def _maybe_fail(self, at: str | int) -> None:
        if self.fault.get("at") != at:
            return
        what = self.fault["do"]
        if what == "raise":
            raise FileNotFoundError("no model.safetensors\n  in /nowhere")
        if what == "exit":
            os._exit(7)
        if what == "hang":
            time.sleep(3600)
        if what == "slow":
            time.sleep(0.3)
