"""A runner without a model, for tests of how plans travel. It misbehaves as its config's `model` asks, in JSON:

{"fault": {"rank": 1, "at": "load" | "allocate" | "construct" | "stage" | <step id>, "do": what}}

with `do` one of "raise" (FileNotFoundError), "exit", "hang" (asleep), "differ" (a step answers otherwise), or
"slow" (a step sleeps 0.3 s). {"collective": true} makes each step sum the ranks over the group.
"""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

from dist_vlm.workers.config import LoadReport, RankConfig
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
        "seed": 0,
    }
    return RankConfig(**(values | changes))


class StandIn:
    """Reports 100 + 10 * rank blocks; a slot's token is 1000 * slot + its position, plus what the group summed."""

    def __init__(self, config: RankConfig, comm: Communicator) -> None:
        self.config, self.comm = config, comm
        wanted = json.loads(config.model)
        fault = wanted.get("fault", {})
        self.fault = fault if fault.get("rank", 0) == config.rank else {}
        self.collective = wanted.get("collective", False)
        self.images: dict[str, float] = {}
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

    def step(self, plan: StepPlan) -> StepResult:
        """An image in `encode` adds its sum to every token, so the answer shows that it arrived."""
        self._maybe_fail(plan.step_id)
        extra = int(sum(self.images[key] for key in plan.encode)) + self._sum_over_ranks()
        if self.fault.get("do") == "differ" and self.fault["at"] == plan.step_id:
            extra += 1
        sampled = tuple(
            SampledTokens(piece.slot, (1000 * piece.slot + piece.start + piece.count + extra,))
            for piece in plan.slices
            if piece.sample
        )
        counters = StepCounters(num_collectives=self.comm.count.total, busy_us=os.getpid())
        return StepResult(plan.step_id, self.config.rank, sampled, counters=counters)

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
