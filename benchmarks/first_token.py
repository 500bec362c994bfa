"""Where the host's time to the first token of one picture request goes, from the call to its return. Prints JSON.

A rank behind Ray takes pictures and plans as a real one does, and answers at once, so what is measured is the way to it
and back. With --model it is a real one, with random weights, and what it takes to launch and to compute is told too.
Each figure is the time from the one before it; the clock is the same in all processes of a machine.

    python benchmarks/first_token.py --rounds 30 --transport ray
    python benchmarks/first_token.py --model a/checkpoint
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pictures import Idle, checkpoint, facts

from dist_vlm import LLM, SamplingParams
from dist_vlm.config import EngineConfig, resolve
from dist_vlm.engine.rank_config import rank_config
from dist_vlm.executor.base import StagedImage, StageKind
from dist_vlm.executor.ray import RayExecutor
from dist_vlm.launch.bench_workload import SIZES, WARM_UP, request
from dist_vlm.workers.models import read_spec
from dist_vlm.workers.pending import PendingStep
from dist_vlm.workers.plan import StepPlan, StepResult

if TYPE_CHECKING:
    from collections.abc import Sequence

MARKS = "FIRST_TOKEN_MARKS"
# In the order in which they happen.
MOMENTS = (
    "prepared", "on the rank", "acknowledged", "planned", "plan sent", "launched", "enqueued", "computed", "collected",
    "returned",
)  # fmt: skip


class Marking(Idle):
    """A rank that writes down when it takes an image and when it is given a plan with one."""

    def stage(self, key: str, kind: str, array: np.ndarray) -> None:
        super().stage(key, kind, array)
        mark("on the rank")

    def launch(self, plan: StepPlan) -> PendingStep:
        if plan.encode:
            mark("launched")
        return super().launch(plan)


def mark(moment: str) -> None:
    with open(os.environ[MARKS], "a", encoding="utf-8") as file:
        file.write(f"{moment}\t{time.monotonic()}\n")


class Timed(RayExecutor):
    """Notes when the driver comes to a moment for the first time."""

    def begin(self) -> None:
        self.moments: dict[str, float] = {}

    def note(self, moment: str) -> None:
        self.moments.setdefault(moment, time.monotonic())

    def stage(self, key: str, kind: StageKind, array: np.ndarray) -> None:
        self.note("prepared")
        super().stage(key, kind, array)

    def poll_staged(self) -> Sequence[StagedImage]:
        images = super().poll_staged()
        if images:
            self.note("acknowledged")
        return images

    def submit(self, plan: StepPlan) -> None:
        self.note("planned")
        super().submit(plan)
        self.note("plan sent")

    def collect(self) -> StepResult:
        result = super().collect()
        self.note("collected")
        return result


def one(llm: LLM, executor: Timed, number: int, marks: Path) -> dict[str, float]:
    """Milliseconds from each moment to the next of one request."""
    inputs = request(number)
    marks.write_text("", encoding="utf-8")
    executor.begin()
    began = time.monotonic()
    llm.generate(inputs, SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
    moments = {**executor.moments, "returned": time.monotonic()}
    for line in marks.read_text(encoding="utf-8").splitlines():
        moment, at = line.split("\t")
        moments[moment] = float(at)
    spent, before = {}, began
    for moment in [moment for moment in MOMENTS if moment in moments]:
        spent[moment] = 1e3 * (moments[moment] - before)
        before = moments[moment]
    return spent | {"all": 1e3 * (before - began)}


def table(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians."""
    return {moment: round(statistics.median(row[moment] for row in rounds), 3) for moment in rounds[0]}


def measure(arguments: argparse.Namespace, model: str, marks: Path) -> dict[str, Any]:
    fields = {"model": model, "load_format": "dummy", "transport": arguments.transport}
    if arguments.model:
        fields |= {"device": arguments.device}
    else:
        fields |= {"device": "cpu", "num_gpu_blocks_override": 20_000, "max_num_seqs": 256}
    config = resolve(EngineConfig.from_fields(**fields))
    executor = Timed(
        rank_config(config, read_spec(model)),
        num_blocks=None if arguments.model else 20_000,
        runner="marking_runner:MarkingRunner" if arguments.model else "first_token:Marking",
        transport=arguments.transport,
    )
    executor.begin()
    with LLM.from_config(config, executor=executor) as llm:
        for number in range(6):
            one(llm, executor, WARM_UP + number, marks)
        rounds = [one(llm, executor, number, marks) for number in range(len(SIZES) * arguments.rounds)]
    sizes = [f"{width}x{height}" for width, height in SIZES]
    return {"ms": {size: table(rounds[place :: len(sizes)]) for place, size in enumerate(sizes)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="requests of each size")
    parser.add_argument("--transport", default="ray", choices=["ray", "direct"])
    parser.add_argument("--model", help="a checkpoint's folder, for a real rank on a GPU")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="of the real rank")
    arguments = parser.parse_args()
    # The rank imports this file by its name.
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        marks = Path(folder) / "marks"
        os.environ[MARKS] = str(marks)
        os.environ["PICTURES_STEP_MS"] = "0"
        measured = measure(arguments, arguments.model or checkpoint(folder), marks)
    json.dump(facts() | {"transport": arguments.transport} | measured, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
