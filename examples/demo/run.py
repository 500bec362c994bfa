"""The main job, end to end: shipped pictures and questions, two ranks through Ray, answers as they come.

    python examples/demo/run.py [--config configs/demo.yaml]

Exits with 1 if an answer is not the expected one.
"""

from __future__ import annotations

import time

_BEGAN = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator, Mapping  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from dist_vlm import LLM, RequestOutput

HERE = Path(__file__).resolve().parent
PICTURES = HERE / "pictures"


@dataclass
class Clock:
    """Seconds by stage, in the order they ended."""

    laps: dict[str, float] = field(default_factory=dict)
    _last: float = _BEGAN

    def lap(self, stage: str) -> float:
        now = time.perf_counter()
        self.laps[stage] = self.laps.get(stage, 0.0) + now - self._last
        self._last = now
        return self.laps[stage]


@dataclass
class Totals:
    """What the questions came to. Times in seconds."""

    num_right: int = 0
    num_tokens: int = 0
    first_token: list[float] = field(default_factory=list)
    decode: float = 0.0
    num_decoded: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(HERE.parents[1] / "configs" / "demo.yaml"), metavar="FILE")
    arguments = parser.parse_args()
    clock = Clock()
    from dist_vlm import LLM
    from dist_vlm.config_load import load_config

    samples = json.loads((PICTURES / "questions.json").read_text(encoding="utf-8"))
    config = load_config(arguments.config, {}).resolve()
    ranks = config.parallel.tensor_parallel_size
    print(f"dist-vlm demo: {ranks} tensor-parallel rank(s) on {config.parallel.device}, placed by Ray ...", flush=True)
    clock.lap("import")
    llm = LLM.from_config(config)
    try:
        clock.lap("start")
        totals = Totals()
        for sample in samples:
            _answer(llm, sample, totals)
        clock.lap("answers")
    finally:
        llm.shutdown()
        clock.lap("shutdown")
    _report(clock, llm.executor_info.start_seconds, totals, len(samples))
    return 0 if totals.num_right == len(samples) else 1


def _answer(llm: LLM, sample: Mapping[str, str], totals: Totals) -> None:
    """Asks one question and writes the answer to the terminal as it grows, the expected one beside it."""
    from dist_vlm.media import load_image

    print(f"\n{sample['image']}: {sample['question']}\n  expected: {sample['answer']}\n  answer:   ", end="")
    began = time.perf_counter()
    written, output, first = "", None, None
    for output in _stream(llm, sample["prompt"], load_image(PICTURES / sample["image"])):
        first = first or time.perf_counter()
        # The prompt ends with a colon; the answer's leading space is no part of it.
        text = output.outputs[0].text.lstrip()
        print(text[len(written) :], end="", flush=True)
        written = text
    assert output is not None and first is not None
    ended = time.perf_counter()
    num_tokens = len(output.outputs[0].token_ids)
    right = written.strip() == sample["answer"]
    print(f"   [{'as expected' if right else 'NOT AS EXPECTED'}, {num_tokens} tokens, {ended - began:.2f} s]")
    totals.num_right += right
    totals.num_tokens += num_tokens
    totals.first_token.append(first - began)
    totals.decode += ended - first
    totals.num_decoded += num_tokens - 1


def _stream(llm: LLM, prompt: str, picture: Any) -> Iterator[RequestOutput]:
    from dist_vlm import SamplingParams

    inputs: Any = {"prompt": prompt, "multi_modal_data": {"image": picture}}
    return llm.stream(inputs, SamplingParams(temperature=0, max_tokens=64))


def _report(clock: Clock, start: Mapping[str, float], totals: Totals, num_samples: int) -> None:
    print(f"\n{totals.num_right} of {num_samples} answers as expected, {totals.num_tokens} tokens")
    first = 1000 * sum(totals.first_token) / num_samples
    each = 1000 * totals.decode / max(1, totals.num_decoded)
    print(f"time to first token {first:.0f} ms, per further token {each:.1f} ms (means)")
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in start.items())
    total = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in clock.laps.items())
    print(f"seconds: {total}, in all {sum(clock.laps.values()):.1f}\n  of start: {stages}")


if __name__ == "__main__":
    sys.exit(main())
