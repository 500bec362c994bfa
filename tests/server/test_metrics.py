"""The series of requests, against a request scripted by hand."""

from __future__ import annotations

import math
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dist_vlm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from dist_vlm.sampling import SamplingParams
from dist_vlm.server import metrics as metrics_module
from dist_vlm.server.metrics import Metrics

NOW = 1_700_000_000.0
LABELS = {"model_name": "m"}


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Metrics:
    monkeypatch.setattr(metrics_module.time, "time", lambda: NOW + 4.0)
    return Metrics("m")


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"dist_vlm:{name}", {**LABELS, **labels})


def output(
    *answers: tuple[int, str | None], times: RequestMetrics | None = None, cached: int = 0, error: str | None = None
) -> RequestOutput:
    """answers: tokens and finish reason of each."""
    return RequestOutput(
        request_id="r",
        prompt="p",
        prompt_token_ids=[0] * 30,
        outputs=[
            CompletionOutput(index=index, text="", token_ids=[1] * count, finish_reason=reason)
            for index, (count, reason) in enumerate(answers)
        ],
        finished=all(reason is not None for _, reason in answers),
        metrics=times,
        num_cached_tokens=cached,
        error=error,
    )


def times(*, first: float | None, last: float | None, queue: float | None = 0.5) -> RequestMetrics:
    """In seconds from the arrival."""
    return RequestMetrics(
        arrival_time=NOW + 0.25,
        first_token_time=None if first is None else NOW + first,
        last_token_time=None if last is None else NOW + last,
        time_in_queue=queue,
    )


def test_one_request_is_counted_in_every_series(metrics: Metrics) -> None:
    meter = metrics.request(SamplingParams(n=2, best_of=3), NOW)
    meter.saw(output((1, None), (0, None)))
    assert (value(metrics, "prompt_tokens_total"), value(metrics, "generation_tokens_total")) == (30, 1)
    assert value(metrics, "request_success_total", finished_reason="stop") == 0
    meter.saw(output((3, "stop"), (2, None)))
    assert value(metrics, "generation_tokens_total") == 5
    meter.saw(output((3, "stop"), (5, "length"), times=times(first=1.0, last=3.0), cached=16))
    for name, expected in {
        "prompt_tokens_total": 30,
        "generation_tokens_total": 8,
        "prompt_cached_tokens_total": 16,
        "time_to_first_token_seconds_sum": 1.0,
        "time_to_first_token_seconds_count": 1,
        "time_per_output_token_seconds_sum": 0.5,  # two seconds for the four tokens after the first
        "time_per_output_token_seconds_count": 1,
        "e2e_request_latency_seconds_sum": 4.0,
        "e2e_request_latency_seconds_count": 1,
        "request_queue_time_seconds_sum": 0.5,
        "request_prompt_tokens_sum": 30,
        "request_prompt_tokens_count": 1,
        "request_generation_tokens_sum": 8,
        "request_generation_tokens_count": 2,
        "request_params_n_sum": 2,
        "request_params_best_of_sum": 3,
        "request_aborted_total": 0,
    }.items():
        assert value(metrics, name) == expected, name
    for reason in ("stop", "length"):
        assert value(metrics, "request_success_total", finished_reason=reason) == 1


def test_two_requests_add_up(metrics: Metrics) -> None:
    for _ in range(2):
        meter = metrics.request(SamplingParams(), NOW)
        meter.saw(output((2, None)))
        meter.saw(output((2, None)))
        meter.saw(output((4, "stop"), times=times(first=1.0, last=2.5)))
    assert value(metrics, "prompt_tokens_total") == 60
    assert value(metrics, "generation_tokens_total") == 8
    assert value(metrics, "request_params_best_of_sum") == 2, "n where it is absent"
    assert value(metrics, "time_per_output_token_seconds_sum") == 1.0
    assert value(metrics, "request_success_total", finished_reason="stop") == 2


def test_an_answer_of_one_token_has_no_time_between_tokens(metrics: Metrics) -> None:
    metrics.request(SamplingParams(), NOW).saw(output((1, "length"), times=times(first=1.0, last=1.0)))
    assert value(metrics, "time_to_first_token_seconds_count") == 1
    assert value(metrics, "time_per_output_token_seconds_count") == 0


@pytest.mark.parametrize("moments", [None, times(first=None, last=None, queue=None)])
def test_a_request_that_ends_without_a_token_is_counted_all_the_same(
    metrics: Metrics, moments: RequestMetrics | None
) -> None:
    metrics.request(SamplingParams(), NOW).saw(output((0, "error"), times=moments, error="it failed"))
    assert value(metrics, "e2e_request_latency_seconds_count") == 1
    assert value(metrics, "time_to_first_token_seconds_count") == 0
    assert value(metrics, "request_success_total", finished_reason="error") == 1


def test_a_clock_that_was_set_back_makes_no_negative_time(metrics: Metrics) -> None:
    metrics.request(SamplingParams(), NOW + 100).saw(output((2, "stop"), times=times(first=1.0, last=0.5)))
    for name in ("time_to_first_token", "e2e_request_latency", "time_per_output_token"):
        assert value(metrics, f"{name}_seconds_sum") == 0


def test_a_request_that_was_given_up_is_counted(metrics: Metrics) -> None:
    metrics.aborted.inc()
    assert value(metrics, "request_aborted_total") == 1


def test_throughput_is_fed(metrics: Metrics) -> None:
    meter = metrics.request(SamplingParams(), NOW)
    meter.saw(output((2, None)))
    meter.saw(output((5, "stop")))
    assert metrics.throughput.mean() == (3.0, 0.5)


def test_the_text_is_prometheus_text_with_buckets_that_add_up(metrics: Metrics) -> None:
    metrics.images.labels("fetch").inc()
    metrics.image_bytes.labels("decode").inc(1000)
    metrics.image_seconds.labels("decode").observe(0.02)
    metrics.responses.labels("/health", "200").inc()
    meter = metrics.request(SamplingParams(), NOW)
    meter.saw(output((3, "stop"), times=times(first=1.0, last=3.0)))
    families = {family.name: family for family in text_string_to_metric_families(metrics.text().decode())}
    assert all(name.startswith("dist_vlm:") for name in families)
    assert all(family.documentation for family in families.values() if not family.name.endswith("_created"))
    for name in ("time_to_first_token_seconds", "image_stage_seconds", "request_prompt_tokens"):
        samples = families[f"dist_vlm:{name}"].samples
        buckets = [sample.value for sample in samples if sample.name.endswith("_bucket")]
        assert buckets == sorted(buckets)
        assert buckets[-1] == 1
        bounds = [float(sample.labels["le"]) for sample in samples if sample.name.endswith("_bucket")]
        assert bounds == sorted(bounds)
        assert math.isinf(bounds[-1])
    (sample,) = (one for one in families["dist_vlm:http_responses"].samples if one.name.endswith("_total"))
    assert (sample.labels, sample.value) == ({"path": "/health", "status": "200"}, 1)


def test_a_models_name_is_escaped() -> None:
    name = 'a "b"\\c\nd'
    metrics = Metrics(name)
    metrics.request(SamplingParams(), time.time()).saw(output((1, "stop")))
    families = text_string_to_metric_families(metrics.text().decode())
    labels = {sample.labels.get("model_name") for family in families for sample in family.samples}
    assert labels == {name}


def test_two_servers_of_one_process_count_apart() -> None:
    first, second = Metrics("a"), Metrics("b")
    first.aborted.inc()
    assert second.registry.get_sample_value("dist_vlm:request_aborted_total", {"model_name": "b"}) == 0
