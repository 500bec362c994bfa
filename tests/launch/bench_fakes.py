"""A clock that is set by hand, and an LLM whose requests take the time that is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_vlm import SamplingParams
from dist_vlm.executor.base import ExecutorInfo
from dist_vlm.launch.bench_engine import TimedEngine
from dist_vlm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from dist_vlm.workers.config import LoadReport


class Words:
    """A tokenizer: a token for each word, its length."""

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


@dataclass
class SlowLLM:
    """seconds: of a call, by its number of prompts and of tokens. prompt_tokens: of each prompt.

    apart: seconds between the first tokens of two neighbours. calls: what was asked for. change: of each output.
    """

    seconds: Callable[[int, int], float]
    prompt_tokens: int = 100
    apart: float = 0.0
    change: Callable[[RequestOutput], None] = lambda output: None
    now: float = 1000.0
    calls: list[tuple[list[Any], SamplingParams]] = field(default_factory=list)
    executor_info = ExecutorInfo(1000, (LoadReport(0, 3, 2, 5, 0, 1, 1000, {}, 0),))

    def get_tokenizer(self) -> Words:
        return Words()

    def generate(self, prompts: Sequence[Any], params: SamplingParams, *, use_tqdm: bool) -> list[RequestOutput]:
        assert not use_tqdm
        self.calls.append((list(prompts), params))
        began, count = self.now, params.max_tokens or 0
        self.now += self.seconds(len(prompts), count)
        outputs = [self._output(index, count, began) for index in range(len(prompts))]
        for output in outputs:
            self.change(output)
        return outputs

    def _output(self, index: int, count: int, began: float) -> RequestOutput:
        first = began + 1 + index * self.apart
        metrics = RequestMetrics(began, first_token_time=first, last_token_time=first + (count - 1) * 0.001)
        answer = CompletionOutput(0, "", list(range(count)), finish_reason="length")
        tokens = [1] * self.prompt_tokens
        return RequestOutput(str(index), None, tokens, [answer], finished=True, metrics=metrics)

    def engine(self) -> TimedEngine:
        return TimedEngine(self, clock=lambda: self.now)  # type: ignore[arg-type]
