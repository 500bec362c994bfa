"""Prometheus series of what server and engine hold at the moment of asking, and of the engine's own counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dist_vlm.engine.state import EngineState
from dist_vlm.server.admission import Admission
from dist_vlm.server.byte_budget import ByteBudget
from dist_vlm.server.metrics import PREFIX, Metrics


class HeldMetrics(Collector):
    """Reads the engine's state as the server last heard it: `Metrics.state`."""

    def __init__(self, metrics: Metrics, *, admission: Admission, budgets: Sequence[ByteBudget]) -> None:
        self._metrics = metrics
        self._admission = admission
        self._budgets = budgets
        metrics.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        prompt, answer = self._metrics.throughput.mean()
        yield self._gauge("avg_prompt_throughput_toks_per_s", "Prompt tokens a second, last 10 s", prompt)
        yield self._gauge("avg_generation_throughput_toks_per_s", "Answer tokens a second, last 10 s", answer)
        yield self._gauge("num_requests_in_server", "Answers in work or waiting", self._admission.num_taken)
        held = GaugeMetricFamily(PREFIX + "held_bytes", "Bytes held for requests, by what they are", labels=["what"])
        limit = GaugeMetricFamily(PREFIX + "held_bytes_limit", "The most that may be held", labels=["what"])
        for budget in self._budgets:
            held.add_metric([budget.name], budget.num_held)
            limit.add_metric([budget.name], budget.capacity)
        yield from (held, limit)
        if self._metrics.state is not None:
            yield from self._of_engine(self._metrics.state)

    def _of_engine(self, state: EngineState) -> Iterator[Metric]:
        stats = state.stats
        waiting = state.num_waiting + state.num_staging
        in_use = state.num_held_blocks / state.num_blocks
        yield self._gauge("num_requests_running", "Sequences in steps", state.num_running)
        yield self._gauge("num_requests_waiting", "Sequences that wait for their turn or their pictures", waiting)
        yield self._gauge("num_requests_swapped", "Always 0: a preempted sequence is computed anew", 0)
        yield self._gauge("gpu_cache_usage_perc", "KV blocks in use, 1 is all", in_use)
        yield self._gauge("cpu_cache_usage_perc", "Always 0: no KV blocks are kept in host memory", 0)
        yield self._gauge("kv_blocks_cached", "KV blocks kept for later requests", state.num_cached_blocks)
        yield self._gauge("feature_rows", "Rows of encoded pictures that the ranks hold", state.num_feature_rows)
        yield self._gauge("staged_images", "Pictures staged for requests", state.num_staged_images)
        yield self._gauge("staged_bytes", "Bytes of pictures staged for requests", state.staged_bytes)
        yield self._count("num_preemptions", "Preemptions", stats.num_preemptions)
        yield self._count("rank_restarts", "Lost ranks started again", state.num_restarts)
        yield self._count("steps", "Steps", stats.num_steps)
        yield self._count("scheduled_tokens", "Tokens computed by steps", stats.num_scheduled_tokens)
        yield self._count("encoded_images", "Pictures encoded", stats.num_encoded_images)
        yield self._count("prefix_cache_queried_tokens", "Tokens sought in the prefix cache", stats.num_queried_tokens)
        yield self._count("prefix_cache_hit_tokens", "Tokens found in the prefix cache", stats.num_hit_tokens)
        yield self._count("image_cache_queries", "Pictures sought among the encoded", stats.num_queried_images)
        yield self._count("image_cache_hits", "Pictures found encoded", stats.num_hit_images)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._metrics.model], value)
        return family

    def _count(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._metrics.model], value)
        return family
