"""What a picture costs the driver: stage by stage, alone until its plan is sent, and many at once. Prints JSON.

A rank behind Ray takes the pictures as a real one does, but runs no model: a step of it sleeps. So everything measured
is the host's: tokenizing, hashing, preprocessing, staging and the step loop beside them. The driver's part of a step
is the time from one result to the wait for the next, in which a rank with a single plan in flight has nothing to do.

    python benchmarks/pictures.py --count 128 --step-ms 5
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dist_vlm import LLM, SamplingParams
from dist_vlm.config import EngineConfig, resolve
from dist_vlm.engine.rank_config import rank_config
from dist_vlm.executor.ray import RayExecutor
from dist_vlm.media import content_key
from dist_vlm.workers.config import LoadReport, RankConfig
from dist_vlm.workers.models import read_spec
from dist_vlm.workers.pending import FinishedStep, PendingStep
from dist_vlm.workers.plan import SampledTokens, StepCounters, StepPlan, StepResult

if TYPE_CHECKING:
    from dist_vlm.workers.comm import Communicator

SIZES = [(336, 336), (640, 480), (1024, 768)]
WORDS = " over the lazy dog while import class return" * 6
STEP_MS = "PICTURES_STEP_MS"


class Idle:
    """A rank that sleeps through its steps and answers with a position in place of a token."""

    def __init__(self, config: RankConfig, comm: Communicator) -> None:
        self.rank = config.rank
        self.step_s = float(os.environ[STEP_MS]) / 1000

    def load(self) -> LoadReport:
        return LoadReport(self.rank, 0, 0, 0, 0, 1, 1_000_000, {}, 0)

    def allocate(self, num_blocks: int) -> None:
        pass

    def stage(self, key: str, kind: str, array: np.ndarray) -> None:
        pass

    def unstage(self, key: str) -> None:
        pass

    def launch(self, plan: StepPlan) -> PendingStep:
        time.sleep(self.step_s)
        sampled = tuple(SampledTokens(piece.slot, (piece.start,)) for piece in plan.slices if piece.sample)
        return FinishedStep(StepResult(plan.step_id, self.rank, sampled, counters=StepCounters()))


class Timed(RayExecutor):
    """Notes when plans with pictures are sent, and how long the driver is busy between two waits for the rank."""

    def begin(self) -> None:
        self.sent: list[float] = []
        self.busy: list[float] = []
        self.freed: float | None = None

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        if plan.encode:
            self.sent += [time.perf_counter()] * len(plan.encode)

    def collect(self) -> StepResult:
        if self.freed is not None:
            self.busy.append(time.perf_counter() - self.freed)
        result = super().collect()
        self.freed = time.perf_counter()
        return result


def picture(number: int) -> Image.Image:
    """Smooth noise in one of the sizes in turn."""
    width, height = SIZES[number % len(SIZES)]
    small = np.random.default_rng(number).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def prompt(number: int) -> Any:
    return {"prompt": f"USER: <image>\n{number}{WORDS} ASSISTANT:", "multi_modal_data": {"image": picture(number)}}


def median_ms(function: Callable[[], Any], repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return round(1e3 * statistics.median(times), 2)


def stages(llm: LLM) -> dict[str, dict[str, float]]:
    """Milliseconds of each step of preparing one picture, one after the other in one thread."""
    front, rows = llm._front, {}
    from transformers import AutoImageProcessor

    images: Any = front.processor._images._processor
    theirs = AutoImageProcessor.from_pretrained(llm.config.model.model, backend="pil")
    for number, (width, height) in enumerate(SIZES):
        inputs = prompt(number)
        image = inputs["multi_modal_data"]["image"]
        array = images.preprocess(image)
        rows[f"{width}x{height}"] = {
            "tokenize": median_ms(lambda text=inputs["prompt"]: front.tokenizer.encode(text)),
            "transformers' processor": median_ms(lambda image=image: theirs(images=image)),
            "preprocess": median_ms(lambda image=image: images.preprocess(image)),
            "content key": median_ms(lambda array=array: content_key(array, settings="")),
            "all": median_ms(lambda inputs=inputs: front.processor.process("0", inputs, SamplingParams())),
        }
    return rows


def alone(llm: LLM, executor: Timed, count: int) -> dict[str, float]:
    """From the call to the plan with the picture, for requests of 640x480 that come one by one."""
    times = []
    for number in range(count):
        inputs = prompt(30_001 + 3 * number)
        executor.begin()
        began = time.perf_counter()
        llm.generate(inputs, SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
        times.append(executor.sent[0] - began)
    return quantiles_ms(times)


def together(llm: LLM, executor: Timed, count: int, max_tokens: int, *, first: int) -> dict[str, Any]:
    """All prompts in one call; their pictures are those from `first` on, which nothing has seen before."""
    prompts = [prompt(number) for number in range(first, first + count)]
    executor.begin()
    began = time.perf_counter()
    llm.generate(prompts, SamplingParams(max_tokens=max_tokens, ignore_eos=True), use_tqdm=False)
    sent = sorted(executor.sent)
    return {
        "first_plan_ms": round(1e3 * (sent[0] - began), 1),
        "pictures_per_s": round(count / (sent[-1] - began), 1),
        "driver_ms_per_step": quantiles_ms(executor.busy),
    }


def texts(llm: LLM, executor: Timed, max_tokens: int) -> dict[str, float]:
    """The driver's part of a step with no picture anywhere, for comparison."""
    executor.begin()
    prompts = [f"{number}{WORDS}" for number in range(64)]
    llm.generate(prompts, SamplingParams(max_tokens=max_tokens, ignore_eos=True), use_tqdm=False)
    return quantiles_ms(executor.busy)


def quantiles_ms(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    places = {"median": len(ordered) // 2, "p90": int(0.9 * len(ordered)), "p99": int(0.99 * len(ordered)), "max": -1}
    return {name: round(1e3 * ordered[place], 2) for name, place in places.items()}


def checkpoint(folder: str) -> str:
    """A checkpoint of the 7b size without weights."""
    program = Path(__file__).parent / "peers" / "make_llava.py"
    command = [sys.executable, str(program), "--preset", "7b", "--out", folder, "--config-only"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def facts() -> dict[str, Any]:
    """What the figures depend on."""
    versions = {name: importlib.metadata.version(name) for name in ("pillow", "numpy", "transformers", "ray")}
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "software": {"python": platform.python_version(), **versions},
    }


def measure(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    config = resolve(
        EngineConfig.from_fields(
            model=model, device="cpu", load_format="dummy", max_num_seqs=256, max_num_batched_tokens=8192,
            num_gpu_blocks_override=20_000, transport=arguments.transport,
        )
    )  # fmt: skip
    ranks = rank_config(config, read_spec(model))
    executor = Timed(ranks, num_blocks=20_000, runner="pictures:Idle", transport=arguments.transport)
    executor.begin()
    with LLM.from_config(config, executor=executor) as llm:
        together(llm, executor, 32, 4, first=100)  # warms up
        return {
            "stages_ms": stages(llm),
            "alone_to_plan_ms": alone(llm, executor, arguments.alone),
            "together": together(llm, executor, arguments.count, arguments.max_tokens, first=1000),
            "texts_driver_ms_per_step": texts(llm, executor, arguments.max_tokens),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=128, help="pictures at once")
    parser.add_argument("--alone", type=int, default=20, help="requests that come one by one")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--step-ms", type=float, default=5.0, help="what a step takes the rank")
    parser.add_argument("--transport", default="direct", choices=["ray", "direct"])
    arguments = parser.parse_args()
    # The rank imports this file by its name.
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    os.environ[STEP_MS] = str(arguments.step_ms)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(arguments, checkpoint(folder))
    details = {"step_ms": arguments.step_ms, "count": arguments.count}
    json.dump(facts() | details | measured, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
