"""Prometheus series: what requests took, and what the engine holds."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from dist_vlm.engine.state import EngineState
from dist_vlm.outputs import RequestOutput
from dist_vlm.sampling import SamplingParams
from dist_vlm.server.throughput import Throughput

PREFIX = "dist_vlm:"

_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30, 60)
_TOKEN_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_REQUEST_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 300)
_STAGE_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
_ANSWERS = (1, 2, 5, 10, 20)


class Metrics:
    """Every series of one server, in a registry of its own.

    model: the served name, a label of the series of requests and of the engine.
    """

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self.model = model
        self.throughput = Throughput()
        self.state: EngineState | None = None
        self._histograms = {
            name: self._histogram(name, text, buckets, "model_name").labels(model)
            for name, text, buckets in (
                ("time_to_first_token_seconds", "From a request's arrival to its first token", _FIRST_TOKEN_S),
                ("time_per_output_token_seconds", "Between two tokens of an answer, on average", _TOKEN_S),
                ("e2e_request_latency_seconds", "From a request's arrival to its end", _REQUEST_S),
                ("request_queue_time_seconds", "From a request's arrival in the engine to its first step", _REQUEST_S),
                ("request_prompt_tokens", "Tokens of prompts, pictures included", _TOKENS),
                ("request_generation_tokens", "Tokens of answers", _TOKENS),
                ("request_params_best_of", "best_of of requests", _ANSWERS),
                ("request_params_n", "n of requests", _ANSWERS),
            )
        }
        self.prompt_tokens = self._of_model("prompt_tokens", "Tokens of prompts")
        self.generation_tokens = self._of_model("generation_tokens", "Tokens of answers")
        self.cached_tokens = self._of_model("prompt_cached_tokens", "Tokens of prompts found in the prefix cache")
        text = "Answers that ended, by their reason"
        self.success = self._counter("request_success", text, "model_name", "finished_reason")
        for reason in ("stop", "length"):
            self.success.labels(model, reason)
        self.aborted = self._of_model("request_aborted", "Requests that were given up before their end")
        self.responses = self._counter("http_responses", "Responses by route and status", "path", "status")
        self.images = self._counter("images", "Pictures that entered a stage: fetch, decode", "stage")
        self.image_bytes = self._counter("image_bytes", "Bytes that left a stage: fetch, decode, preprocess", "stage")
        self.image_seconds = self._histogram("image_stage_seconds", "Time of a picture in a stage", _STAGE_S, "stage")

    def request(self, params: SamplingParams, arrival_time: float) -> RequestMeter:
        """Begins to count a request. arrival_time: `time.time()` of its arrival at the server."""
        self.observe("request_params_n", params.n)
        self.observe("request_params_best_of", params.best_of or params.n)
        return RequestMeter(self, arrival_time)

    def text(self) -> bytes:
        """Every series in Prometheus' text form."""
        return generate_latest(self.registry)

    def observe(self, name: str, value: float) -> None:
        """Adds a value to a histogram of requests."""
        self._histograms[name].observe(max(0.0, value))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _of_model(self, name: str, text: str) -> Counter:
        """A counter that is there, at 0, from the start."""
        return self._counter(name, text, "model_name").labels(self.model)


class RequestMeter:
    """Counts one request as its output grows."""

    def __init__(self, metrics: Metrics, arrival_time: float) -> None:
        self._metrics = metrics
        self._arrival_time = arrival_time
        self._num_tokens = 0
        self._has_begun = False

    def saw(self, output: RequestOutput) -> None:
        """Takes the request's output as it now is; the last one is finished."""
        metrics = self._metrics
        if not self._has_begun:
            self._has_begun = True
            num_prompt = len(output.prompt_token_ids)
            metrics.prompt_tokens.inc(num_prompt)
            metrics.observe("request_prompt_tokens", num_prompt)
            metrics.throughput.add(num_prompt, 0)
        num_tokens = sum(len(answer.token_ids) for answer in output.outputs)
        metrics.generation_tokens.inc(num_tokens - self._num_tokens)
        metrics.throughput.add(0, num_tokens - self._num_tokens)
        self._num_tokens = num_tokens
        if output.finished:
            self._end(output)

    def _end(self, output: RequestOutput) -> None:
        metrics = self._metrics
        metrics.cached_tokens.inc(output.num_cached_tokens)
        for answer in output.outputs:
            metrics.observe("request_generation_tokens", len(answer.token_ids))
            metrics.success.labels(metrics.model, answer.finish_reason or "none").inc()
        metrics.observe("e2e_request_latency_seconds", time.time() - self._arrival_time)
        times = output.metrics
        if times is None or times.first_token_time is None or times.last_token_time is None:
            return
        metrics.observe("time_to_first_token_seconds", times.first_token_time - self._arrival_time)
        if times.time_in_queue is not None:
            metrics.observe("request_queue_time_seconds", times.time_in_queue)
        longest = max(len(answer.token_ids) for answer in output.outputs)
        if longest > 1:
            span = times.last_token_time - times.first_token_time
            metrics.observe("time_per_output_token_seconds", span / (longest - 1))
