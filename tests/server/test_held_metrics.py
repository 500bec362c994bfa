"""The series of what is held, and the names that dashboards of the seed's server know."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from dist_vlm.engine.state import EngineState
from dist_vlm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from dist_vlm.sampling import SamplingParams
from dist_vlm.sched.scheduler import SchedulerStats
from dist_vlm.server.admission import Admission
from dist_vlm.server.byte_budget import ByteBudget
from dist_vlm.server.held_metrics import HeldMetrics
from dist_vlm.server.metrics import Metrics

# The seed's series, its prefix exchanged for ours, and their types.
SEED = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "num_requests_swapped": "gauge",
    "gpu_cache_usage_perc": "gauge",
    "cpu_cache_usage_perc": "gauge",
    "num_preemptions_total": "counter",
    "prompt_tokens_total": "counter",
    "generation_tokens_total": "counter",
    "time_to_first_token_seconds": "histogram",
    "time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "request_params_best_of": "histogram",
    "request_params_n": "histogram",
    "request_success_total": "counter",
    "avg_prompt_throughput_toks_per_s": "gauge",
    "avg_generation_throughput_toks_per_s": "gauge",
}

STATE = EngineState(
    stats=SchedulerStats(
        num_steps=101,
        num_scheduled_tokens=102,
        num_preemptions=103,
        num_encoded_images=104,
        num_image_cuts=105,
        num_queried_tokens=106,
        num_hit_tokens=107,
        num_queried_images=108,
        num_hit_images=109,
    ),
    num_running=2,
    num_waiting=3,
    num_staging=4,
    num_blocks=200,
    num_held_blocks=50,
    num_cached_blocks=25,
    num_feature_rows=64,
    feature_row_capacity=None,
    num_staged_images=5,
    staged_bytes=6000,
    num_restarts=7,
)


class Rig:
    def __init__(self) -> None:
        self.metrics = Metrics("m")
        self.admission = Admission(max_seats=10, num_running=2)
        self.budgets = [ByteBudget("bodies", 1000, timeout_s=1), ByteBudget("files", 500, timeout_s=1)]
        HeldMetrics(self.metrics, admission=self.admission, budgets=self.budgets)

    def families(self) -> dict[str, Metric]:
        """By the name that samples of a counter have, without the prefix."""
        found = {}
        for family in text_string_to_metric_families(self.metrics.text().decode()):
            name = family.name.removeprefix("dist_vlm:")
            found[f"{name}_total" if family.type == "counter" else name] = family
        return found

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"dist_vlm:{name}", labels or {"model_name": "m"})


def test_every_series_of_the_seed_is_there_with_its_type_before_and_after_a_request() -> None:
    assert len(SEED) == 18
    rig = Rig()
    rig.metrics.state = STATE
    for _ in range(2):
        families = rig.families()
        assert {name: families[name].type for name in SEED} == SEED
        for name in SEED:
            samples = families[name].samples
            assert samples, f"{name} has no sample"
            assert all(sample.labels["model_name"] == "m" for sample in samples)
        meter = rig.metrics.request(SamplingParams(), 1.0)
        meter.saw(
            RequestOutput(
                request_id="r",
                prompt="p",
                prompt_token_ids=[1],
                outputs=[CompletionOutput(index=0, text="", token_ids=[1, 2], finish_reason="stop")],
                finished=True,
                metrics=RequestMetrics(arrival_time=1.0, first_token_time=2.0, last_token_time=3.0),
            )
        )


def test_before_the_engine_was_heard_its_series_are_absent() -> None:
    """Not zero: a server whose engine does not answer is not idle."""
    families = Rig().families()
    assert "num_requests_running" not in families
    assert "num_preemptions_total" not in families
    assert {"num_requests_in_server", "held_bytes", "held_bytes_limit"} <= families.keys()


def test_what_the_engine_holds_is_told_as_it_said() -> None:
    rig = Rig()
    rig.metrics.state = STATE
    for name, expected in {
        "num_requests_running": 2,
        "num_requests_waiting": 7,
        "num_requests_swapped": 0,
        "gpu_cache_usage_perc": 0.25,
        "cpu_cache_usage_perc": 0,
        "kv_blocks_cached": 25,
        "feature_rows": 64,
        "staged_images": 5,
        "staged_bytes": 6000,
        "steps_total": 101,
        "scheduled_tokens_total": 102,
        "num_preemptions_total": 103,
        "rank_restarts_total": 7,
        "encoded_images_total": 104,
        "prefix_cache_queried_tokens_total": 106,
        "prefix_cache_hit_tokens_total": 107,
        "image_cache_queries_total": 108,
        "image_cache_hits_total": 109,
    }.items():
        assert rig.value(name) == expected, name
    rig.metrics.state = dataclasses.replace(STATE, num_running=8, num_held_blocks=200)
    assert (rig.value("num_requests_running"), rig.value("gpu_cache_usage_perc")) == (8, 1)


def test_what_the_server_holds_is_told_as_it_is_now() -> None:
    rig = Rig()

    async def main() -> None:
        with rig.admission.enter() as seat:
            seat.grow(3)
            async with rig.budgets[0].share(400) as share:
                assert rig.value("num_requests_in_server") == 3
                assert rig.value("held_bytes", what="bodies") == 400
                share.shrink(100)
                assert rig.value("held_bytes", what="bodies") == 100
                assert rig.value("held_bytes", what="files") == 0

    asyncio.run(main())
    assert rig.value("num_requests_in_server") == 0
    assert rig.value("held_bytes", what="bodies") == 0
    assert rig.value("held_bytes_limit", what="bodies") == 1000
    assert rig.value("held_bytes_limit", what="files") == 500


def test_throughput_is_over_the_last_ten_seconds() -> None:
    rig = Rig()
    rig.metrics.throughput.add(50, 20)
    assert rig.value("avg_prompt_throughput_toks_per_s") == pytest.approx(5)
    assert rig.value("avg_generation_throughput_toks_per_s") == pytest.approx(2)


def test_no_two_series_have_one_name() -> None:
    rig = Rig()
    rig.metrics.state = STATE
    text = rig.metrics.text().decode()
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
