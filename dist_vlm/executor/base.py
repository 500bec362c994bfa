"""How a plan reaches the ranks and how their answer comes back."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dist_vlm.workers.config import LoadReport
from dist_vlm.workers.plan import StepPlan, StepResult

if TYPE_CHECKING:
    import numpy as np

StageKind = Literal["coded_pixels", "pixel_values", "image_features"]


class ExecutorError(RuntimeError):
    """The ranks cannot go on. `rank` is the one to blame, where it is known.

    stage: what was being done: "ray", "placement", "actor", "join", "load", "allocate", "step", ...
    """

    def __init__(self, stage: str, cause: str, rank: int | None = None) -> None:
        self.stage, self.cause, self.rank = stage, cause, rank
        where = f"rank {rank}" if rank is not None else "no rank yet"
        super().__init__(f"{stage} failed ({where}): {cause}")


class StartError(ExecutorError):
    """The ranks could not be started; nothing of them is left."""


@dataclass(frozen=True, slots=True)
class StagedImage:
    """Every rank has acknowledged an image (`error` is None), or one could not take it."""

    key: str
    error: str | None


@dataclass(frozen=True, slots=True)
class ExecutorInfo:
    """What a started executor offers.

    num_blocks: KV blocks, the smallest number over the ranks.
    reports: one a rank, in rank order.
    start_seconds: stage of the start -> seconds it took, in their order; "stage: part" is within its stage.
    """

    num_blocks: int
    reports: tuple[LoadReport, ...]
    start_seconds: dict[str, float] = field(default_factory=dict)


class Executor(ABC):
    """Owns the ranks. Not safe for use from several threads, `heard_at` apart.

    can_restart: whether `restart` can replace lost ranks.
    serves_logits_processors: whether a rank can call functions of the driver's process.
    last_results: every rank's result of the plan collected last, in rank order.
    """

    can_restart: bool = False
    serves_logits_processors: ClassVar[bool] = False
    last_results: tuple[StepResult, ...] = ()

    @abstractmethod
    def start(self) -> ExecutorInfo:
        """Starts the ranks and loads the model. Raises `StartError` within the configured deadline."""

    @abstractmethod
    def stage(self, key: str, kind: StageKind, array: np.ndarray) -> None:
        """Begins to hand an image to every rank; `poll_staged` tells when it has arrived.

        key: the image's content key.
        array: coded pixels (see `workers/coded_pixels.py`), or pixel values [1, channels, height, width], or
            vision-tower output [1, rows, width], both float32. The caller must not write to it afterwards.
        """

    @abstractmethod
    def poll_staged(self) -> Sequence[StagedImage]:
        """Images whose staging has ended since the last call. Does not block."""

    def wait_staged(self, timeout_s: float) -> None:
        """Until `poll_staged` may have something to tell, or so long. For when there is nothing else to do."""
        time.sleep(timeout_s)

    @abstractmethod
    def unstage(self, key: str) -> None:
        """Forgets a staged image. No submitted and uncollected plan may name it in `encode`."""

    @abstractmethod
    def submit(self, plan: StepPlan) -> None:
        """Sends a plan to every rank and does not wait for it. Plans run in the order of their submission.

        Another may follow before its result is collected: as many as the executor was built for.
        """

    @abstractmethod
    def collect(self) -> StepResult:
        """Waits for the answer to the oldest uncollected plan: rank 0's, once all ranks have given the same.

        Raises `ExecutorError` if a rank died, took too long, or answered differently.
        """

    def set_processors(self, name: str, processors: Sequence[Callable[..., Any]] | None) -> None:
        """Registers the functions that `SamplingRow.processors` names, for plans submitted from now on; None forgets.

        Raises `ExecutorError` where `serves_logits_processors` is False.
        """
        cause = "logits processors are functions of this process: only the executor 'inline' has its rank here"
        raise ExecutorError("set_processors", cause)

    @abstractmethod
    def heard_at(self) -> tuple[float, ...]:
        """`time.monotonic()` at which each rank last finished a step or answered a ping, in rank order.

        Empty before the start. May be called from any thread, and does not block.
        """

    @abstractmethod
    def check(self) -> None:
        """Raises `ExecutorError` if ranks are lost: so a death is noticed while there is no plan to collect. Cheap."""

    def restart(self) -> ExecutorInfo:
        """After an `ExecutorError`: ends what is left of the ranks and starts others in their place, to whom nothing is
        staged and no plan was submitted. Raises `StartError`."""
        raise ExecutorError("restart", "this executor's ranks cannot be started again")

    @abstractmethod
    def shutdown(self) -> None:
        """Ends every rank and frees what they held. May be called twice, and after a failure."""
