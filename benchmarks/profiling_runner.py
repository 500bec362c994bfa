"""A rank's runner that profiles decode steps: for `step_timeline.py`, which tells it what by the environment."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dist_vlm.workers.comm import Communicator
from dist_vlm.workers.config import LoadReport, RankConfig
from dist_vlm.workers.pending import PendingStep
from dist_vlm.workers.plan import StepPlan
from dist_vlm.workers.runner import Runner

WISH = "STEP_TIMELINE"


class ProfilingRunner(Runner):
    """Of each batch size that is wished for: some steps go by, some are timed, and then some are profiled.

    The wish: {"folder": where the traces go, "batches": sizes, "skip": steps that go by, "steps": of each kind}.
    """

    def __init__(self, config: RankConfig, comm: Communicator) -> None:
        super().__init__(config, comm)
        self._wish: dict[str, Any] = json.loads(os.environ[WISH])
        self._open = set(self._wish["batches"]) if config.rank == 0 else set()
        self._batch, self._seen, self._timed_from = 0, 0, 0.0
        self._profile: profile | None = None

    def load(self) -> LoadReport:
        # What traces kernels is there before anything is recorded: later, those of recordings might stay unseen.
        with self._profiler():
            torch.zeros(1, device=self.device).add_(1)
        return super().load()

    def launch(self, plan: StepPlan) -> PendingStep:
        batch = len(plan.slices) if all(piece.count == 1 and piece.sample for piece in plan.slices) else 0
        self._before_step(batch)
        return super().launch(plan)

    def _before_step(self, batch: int) -> None:
        if batch != self._batch:
            self._batch, self._seen = batch, 0
            self._abandon()
        if batch not in self._open:
            return
        seen, skip, steps = self._seen, self._wish["skip"], self._wish["steps"]
        self._seen += 1
        if seen == skip:
            self._timed_from = time.perf_counter()
        elif seen == skip + steps:
            self._timed_s = (time.perf_counter() - self._timed_from) / steps
            self._profile = self._profiler()
            self._profile.start()
        elif seen == skip + 2 * steps and self._profile is not None:
            self._write(self._profile)
            self._profile = None
            self._open.discard(batch)

    def _abandon(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, profiled: profile) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        profiled.stop()
        folder = Path(self._wish["folder"])
        profiled.export_chrome_trace(str(folder / f"{self._batch}.trace.json"))
        (folder / f"{self._batch}.json").write_text(json.dumps({"unprofiled_us": 1e6 * self._timed_s}))

    def _profiler(self) -> profile:
        on_gpu = self.device.type == "cuda"
        return profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])
