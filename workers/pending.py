"""Steps between their launch and their result, which may still be on its way from the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from dist_vlm.workers.plan import StepResult


class PendingStep(Protocol):
    """What `Runner.launch` returns."""

    def ready(self) -> bool:
        """Whether `result` would return at once. Does not block."""
        ...

    def result(self) -> StepResult:
        """Waits for the step to end. Raises what the step raised."""
        ...


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step that ended before its launch returned, as every step of a CPU does."""

    finished: StepResult

    def ready(self) -> bool:
        return True

    def result(self) -> StepResult:
        return self.finished


@dataclass(frozen=True, slots=True)
class FinishedSteps:
    """A rank's answer to one message: results it has not given before, in the order of their steps; maybe none."""

    results: tuple[StepResult, ...]
