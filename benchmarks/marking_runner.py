"""A rank's runner that writes down when it comes to a moment of a request: for `first_token.py` on a GPU."""

from __future__ import annotations

import numpy as np
from first_token import mark

from dist_vlm.workers.pending import PendingStep
from dist_vlm.workers.plan import StepPlan, StepResult
from dist_vlm.workers.runner import Runner


class MarkingRunner(Runner):
    def stage(self, key: str, kind: str, array: np.ndarray) -> None:
        super().stage(key, kind, array)
        mark("on the rank")

    def launch(self, plan: StepPlan) -> PendingStep:
        if not plan.encode:
            return super().launch(plan)
        mark("launched")
        step = super().launch(plan)
        mark("enqueued")
        return Marked(step)


class Marked(PendingStep):
    """A step with a picture."""

    def __init__(self, step: PendingStep) -> None:
        self._step = step

    def ready(self) -> bool:
        return self._step.ready()

    def result(self) -> StepResult:
        result = self._step.result()
        mark("computed")
        return result
