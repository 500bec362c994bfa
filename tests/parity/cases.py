"""The prompts of the parity matrix: 64 with pictures for each checkpoint, and as many without."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .reference import Case

ROOT = Path(__file__).resolve().parents[2]
NUM_CASES = 64


@functools.cache
def demo_cases(*, with_images: bool) -> tuple[Case, ...]:
    """Held-out pictures of the demo, each with its question; without pictures, the questions alone."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from examples.demo.dataset import held_out_examples

    cases = []
    for example in held_out_examples(NUM_CASES, seed=7):
        question = example.qa.question
        if with_images:
            cases.append(Case(f"USER: <image>\n{question} ASSISTANT:", example.draw()))
        else:
            cases.append(Case(f"USER: {question} ASSISTANT:", None))
    return tuple(cases)


@functools.cache
def noise_cases(*, with_images: bool) -> tuple[Case, ...]:
    """Pictures of noise and shapes in eight sizes, for a checkpoint of random weights."""
    cases = []
    for request in _workload().requests(NUM_CASES, seed=3):
        words = " ".join(request.question.split()[:5])
        if with_images:
            cases.append(Case(f"USER: <image>\n{words}? ASSISTANT:", request.image))
        else:
            cases.append(Case(f"USER: {words} {request.id}? ASSISTANT:", None))
    return tuple(cases)


def _workload() -> ModuleType:
    """The workload that the peers were measured with; a program, not a package."""
    spec = importlib.util.spec_from_file_location("workload", ROOT / "benchmarks" / "peers" / "workload.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["workload"] = module
    spec.loader.exec_module(module)
    return module
