from __future__ import annotations

import pytest
from bench_fakes import SlowLLM

from dist_vlm.launch.bench_floor import Floor
from dist_vlm.launch.bench_rates import DeviceRates
from dist_vlm.launch.bench_throughput import report

# Two seconds of prefill for 10 tokens, one for an image, and two for each decode step.
FLOOR = Floor(
    rates=DeviceRates(100.0, 100.0, "bfloat16"),
    item_bytes=2,
    layer_parameters=10.0,
    head_parameters=0.0,
    kv_token_bytes=0.0,
    vision_parameters=10,
    image_rows=5,
    image_share=1.0,
)


def test_rates_are_counts_by_the_time_of_the_call() -> None:
    timed = SlowLLM(lambda *_: 16.0, prompt_tokens=10).engine().run(["a"] * 4, 3)
    found = {one.name: one for one in report(timed, FLOOR, batch=4).figures}
    assert {name: one.value for name, one in found.items()} == {
        "requests_per_s": 0.25,
        "output_tokens_per_s": 0.75,
        "prompt_tokens_per_s": 2.5,
        "seconds": 16.0,
    }
    # 4 * (2 + 1) of prefill and two steps of max(20 bytes / 100, 2 * 10 * 4 / 100) s.
    least = 4 * (2 + 1) + 2 * 0.8
    assert found["seconds"].floor == pytest.approx(least)
    assert found["requests_per_s"].floor == pytest.approx(4 / least)
    assert [one.share for one in found.values()] == [pytest.approx(least / 16)] * 4


def test_without_rates_there_is_no_floor_and_the_counts_are_there() -> None:
    timed = SlowLLM(lambda *_: 16.0, prompt_tokens=10, apart=0.5).engine().run(["a"] * 4, 3)
    found = report(timed, None, batch=4)
    assert {one.floor for one in found.figures} == {None}
    assert found.details == {
        "prompt_tokens": 40,
        "output_tokens": 12,
        "first_token": {"count": 4, "median_ms": 1750.0, "min_ms": 1000.0, "max_ms": 2500.0, "p99_ms": 2500.0},
        "preemptions": 0,
        "cached_prompt_tokens": 0,
    }
