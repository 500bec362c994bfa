from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench_fakes import SlowLLM

from dist_vlm import EngineConfig
from dist_vlm.config import resolve
from dist_vlm.launch import bench_all, bench_latency, bench_steps, bench_throughput
from dist_vlm.launch.bench_engine import MeasuredEngine


def tasks(*words: str) -> list[Any]:
    parser = argparse.ArgumentParser()
    bench_all.add_flags(parser)
    return list(bench_all.tasks(parser.parse_args(words)))


def test_each_has_its_own_settings_and_what_it_takes_by_itself() -> None:
    latency, steps, throughput = tasks("--latency-rounds", "7", "--steps-rounds", "2", "--throughput-warm-up", "5")
    assert latency.chosen == bench_latency.Settings(rounds=7, output_tokens=128, warm_up=3)
    assert steps.chosen == bench_steps.Settings(batches=(1, 16, 64, 256), prompt_tokens=32, tokens=(32, 160), rounds=2)
    assert throughput.chosen == bench_throughput.Settings(requests=512, output_tokens=128, warm_up=5)
    assert [task.prefix for task in (latency, steps, throughput)] == ["--latency-", "--steps-", "--throughput-"]


def test_some_of_them_keep_their_order() -> None:
    assert [task.name for task in tasks("--only", "throughput,latency,throughput")] == ["latency", "throughput"]


def test_no_request_of_an_engine_is_like_another(tiny_facts: Path) -> None:
    """Or it would find its picture, or its beginning, in the caches. Both calls of a latency's round have the words
    alike, and other pictures."""
    llm = SlowLLM(lambda prompts, count: prompts + count, prompt_tokens=100)
    engine = MeasuredEngine(resolve(EngineConfig.from_fields(model=str(tiny_facts), device="cpu")), llm, None)  # type: ignore[arg-type]
    chosen = ["--steps-batches", "1,3", "--steps-prompt-tokens", "40", "--throughput-requests", "9"]
    chosen += ["--throughput-warm-up", "7", "--latency-rounds", "4", "--latency-warm-up", "4"]
    for task in tasks(*chosen):
        task.measure(engine)
    given = [one for call, _ in llm.calls for one in call]
    pictures = [one["multi_modal_data"]["image"].tobytes() for one in given if "prompt" in one]
    tokens = [tuple(one["prompt_token_ids"]) for one in given if "prompt" not in one]
    assert len(pictures) == len(set(pictures)) == 2 * (4 + 4) + 7 + 9
    assert len(tokens) == len(set(tokens)) == (1 + 3) * (1 + 2 * 3)
