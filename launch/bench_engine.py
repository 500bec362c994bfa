"""Requests through a started engine, timed, with what must hold of their answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dist_vlm.config import ConfigError
from dist_vlm.launch.bench_workload import NUM_WORDS

if TYPE_CHECKING:
    from dist_vlm import LLM, SamplingParams
    from dist_vlm.config import EngineConfig
    from dist_vlm.launch.bench_floor import Floor
    from dist_vlm.launch.bench_rates import DeviceRates
    from dist_vlm.outputs import RequestOutput


@dataclass(frozen=True, slots=True)
class Timed:
    """seconds: from the call to its return."""

    seconds: float
    outputs: list[RequestOutput]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(output.prompt_token_ids) for output in self.outputs)

    @property
    def num_output_tokens(self) -> int:
        return sum(len(output.outputs[0].token_ids) for output in self.outputs)

    @property
    def first_token_s(self) -> list[float]:
        """Of each request, from when the engine took it in."""
        return [_metrics(output).first_token_time - _metrics(output).arrival_time for output in self.outputs]

    @property
    def overlapped(self) -> bool:
        """Whether there was a moment at which every request had begun to answer and none had ended."""
        first = max(_metrics(output).first_token_time for output in self.outputs)
        return bool(first <= min(_metrics(output).last_token_time for output in self.outputs))

    def books(self) -> dict[str, int]:
        """What would make the same work cost more or less, for the record."""
        return {
            "preemptions": sum(output.num_preemptions for output in self.outputs),
            "cached_prompt_tokens": sum(output.num_cached_tokens for output in self.outputs),
        }


def _metrics(output: RequestOutput) -> Any:
    return output.metrics


class TimedEngine:
    """clock: seconds that only go forward."""

    def __init__(self, llm: LLM, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._llm, self._clock = llm, clock

    def run(self, prompts: Sequence[Any], num_tokens: int) -> Timed:
        """All in one call, greedily, past any end of sequence.

        Raises `RuntimeError` unless each answer has `num_tokens` tokens.
        """
        params = greedy(num_tokens)
        began = self._clock()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = self._clock() - began
        for output in outputs:
            check_output(output, num_tokens)
        if len(outputs) != len(prompts):
            raise RuntimeError(f"{len(outputs)} of {len(prompts)} requests were answered")
        return Timed(seconds, outputs)


@dataclass(frozen=True, slots=True)
class MeasuredEngine:
    """A started engine, for any number of measurements. config: resolved. floor: None without rates."""

    config: EngineConfig
    llm: LLM
    floor: Floor | None

    def timed(self) -> TimedEngine:
        return TimedEngine(self.llm)

    def facts(self) -> dict[str, Any]:
        """What the ranks told of themselves, for the record; rank 0's, where it is the same on all."""
        info = self.llm.executor_info
        first = info.reports[0]
        return {
            "kv_blocks": info.num_blocks,
            "language_parameters": [one.num_language_parameters for one in info.reports],
            "vision_parameters": first.num_vision_parameters,
            "weight_bytes": [one.weight_bytes for one in info.reports],
            "kernels": first.kernels,
        }


@contextmanager
def started_engine(config: EngineConfig, rates: DeviceRates | None) -> Iterator[MeasuredEngine]:
    """config: resolved. Ranks that are lost end it: the seconds of a start would be in what is measured."""
    from dist_vlm import LLM

    with LLM.from_config(config.replace(max_restarts=0)) as llm:
        yield MeasuredEngine(config, llm, _floor_of(config, llm, rates))


def greedy(num_tokens: int) -> SamplingParams:
    from dist_vlm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


def check_output(output: RequestOutput, num_tokens: int) -> None:
    """Raises `RuntimeError` for an answer that is not the work asked for."""
    if output.error is not None:
        raise RuntimeError(f"request {output.request_id} failed: {output.error}")
    found = len(output.outputs[0].token_ids)
    if found != num_tokens:
        raise RuntimeError(f"request {output.request_id} has {found} tokens: must have {num_tokens}")


def _floor_of(config: EngineConfig, llm: LLM, rates: DeviceRates | None) -> Floor | None:
    if rates is None:
        return None
    from dist_vlm.launch.bench_floor import Floor
    from dist_vlm.workers.models import read_spec

    return Floor.of(config, read_spec(config.model.model), llm.executor_info, rates)


def check_pictures_fit(config: EngineConfig, *, num_tokens: int) -> None:
    """Raises `ConfigError` where a request of the workload, with an answer of `num_tokens`, cannot be served."""
    vision, longest = config.vision, config.model.max_model_len
    if vision.image_token_id is None or vision.image_input_type == "image_features" or vision.disable_image_processor:
        raise ConfigError("the configuration takes no pictures, and the workload is made of them", field="vision")
    # Each word is at least one token.
    room = (longest or 0) - (vision.image_feature_size or 0) - NUM_WORDS
    if room < 1:
        raise ConfigError(
            f"must be above {(vision.image_feature_size or 0) + NUM_WORDS}, the least that a prompt of the workload is",
            field="model.max_model_len",
            value=longest,
        )
    if num_tokens > room:
        problem = f"must be at most {room}: a prompt and its answer have {longest} tokens at most"
        raise ConfigError(problem, field="output_tokens", value=num_tokens, source="--output-tokens")
