"""`dist-vlm bench steps`: what a decode step takes, by the number of sequences in it."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dist_vlm.config import ConfigError
from dist_vlm.launch.bench_engine import MeasuredEngine, TimedEngine
from dist_vlm.launch.bench_figures import Figure, Report, spread_ms
from dist_vlm.launch.bench_flags import Flags, several, two_lengths, whole
from dist_vlm.launch.bench_workload import NUM_WORDS, WARM_UP, token_prompt

if TYPE_CHECKING:
    from dist_vlm.config import EngineConfig
    from dist_vlm.inputs import TokensPrompt
    from dist_vlm.launch.bench_floor import Floor

HELP = "a decode step of text, by batch"
TEXT = """\
Answers as many prompts of text at once as a batch has sequences, with short answers and with long ones. A step takes
(time of the long ones - time of the short ones) / (difference of their tokens), so that prefill, and taking the
requests in, drop out. The short ones must be long enough that all requests run at the same time.

The floor: a read of the weights at the measured bandwidth, or their products at the measured FLOP/s where those take
longer, and a read of the keys and values."""


@dataclass(frozen=True, slots=True)
class Settings:
    """tokens: of the short and of the long answers."""

    batches: tuple[int, ...]
    prompt_tokens: int
    tokens: tuple[int, int]
    rounds: int


def add_flags(parser: Flags) -> None:
    parser.add_argument(
        "--batches", type=several, default=(1, 16, 64, 256), metavar="N,N", help="sequences of a step (1,16,64,256)"
    )
    parser.add_argument("--prompt-tokens", type=whole(1), default=32, metavar="N", help="length of each prompt (32)")
    parser.add_argument(
        "--tokens",
        type=two_lengths,
        default=(32, 160),
        metavar="N,N",
        help="short and long answers, in tokens (32,160)",
    )
    parser.add_argument("--rounds", type=whole(1), default=3, metavar="N", help="pairs of runs for each batch (3)")


def settings(arguments: argparse.Namespace) -> Settings:
    return Settings(arguments.batches, arguments.prompt_tokens, arguments.tokens, arguments.rounds)


def check(config: EngineConfig, chosen: Settings) -> None:
    most, longest = config.scheduler.max_num_seqs, config.model.max_model_len
    if max(chosen.batches) > most:
        _refuse(f"must be at most scheduler.max_num_seqs, which is {most}", "batches", max(chosen.batches))
    if chosen.prompt_tokens > NUM_WORDS:
        _refuse(f"must be at most {NUM_WORDS}, the words of a prompt", "prompt-tokens", chosen.prompt_tokens)
    if longest is not None and chosen.prompt_tokens + chosen.tokens[1] > longest:
        room = longest - chosen.prompt_tokens
        _refuse(f"must be at most {room}: prompt and answer have {longest} at most", "tokens", chosen.tokens[1])


def _refuse(problem: str, flag: str, value: int) -> None:
    raise ConfigError(problem, field=flag, value=value, source=f"--{flag}")


def measure(engine: MeasuredEngine, chosen: Settings) -> Report:
    _check_cache(engine, chosen)
    timed, tokenizer = engine.timed(), engine.llm.get_tokenizer()
    prompts = Prompts(tokenizer, num_tokens=chosen.prompt_tokens)
    warm_up = Prompts(tokenizer, num_tokens=chosen.prompt_tokens, first=WARM_UP)
    steps = {}
    for batch in chosen.batches:
        timed.run(warm_up.take(batch), chosen.tokens[0])
        steps[batch] = step_times(timed, prompts, batch, chosen)
    return report(steps, engine.floor, chosen).also(engine=engine.facts())


def _check_cache(engine: MeasuredEngine, chosen: Settings) -> None:
    """Raises `ConfigError` where the largest batch would not stay in the KV cache."""
    block, blocks = engine.config.cache.block_size, engine.llm.executor_info.num_blocks
    needed = max(chosen.batches) * -(-(chosen.prompt_tokens + chosen.tokens[1]) // block)
    if needed > blocks:
        problem = f"needs {needed} blocks of {block} tokens, and the KV cache has {blocks}"
        _refuse(problem, "batches", max(chosen.batches))


class Prompts:
    """Prompts of which none is given twice. first: number of the first one."""

    def __init__(self, tokenizer: Any, *, num_tokens: int, first: int = 0) -> None:
        self._tokenizer, self._num_tokens = tokenizer, num_tokens
        self._numbers = itertools.count(first)

    def take(self, count: int) -> list[TokensPrompt]:
        numbers = itertools.islice(self._numbers, count)
        return [token_prompt(self._tokenizer, index, num_tokens=self._num_tokens) for index in numbers]


def step_times(engine: TimedEngine, prompts: Prompts, batch: int, chosen: Settings) -> list[float]:
    """Seconds of a step, one number a round. Raises `RuntimeError` for a batch that was never whole."""
    short, long = chosen.tokens
    found = []
    for _ in range(chosen.rounds):
        brief = engine.run(prompts.take(batch), short)
        lengthy = engine.run(prompts.take(batch), long)
        if not (brief.overlapped and lengthy.overlapped):
            raise RuntimeError(
                f"--tokens {short},{long}: the first of {batch} requests had ended when the last one began; the short "
                "answers must be longer"
            )
        found.append((lengthy.seconds - brief.seconds) / (long - short))
    return found


def report(steps: Mapping[int, Sequence[float]], floor: Floor | None, chosen: Settings) -> Report:
    # Of the steps by which the long answers are longer.
    mean_context = chosen.prompt_tokens + (chosen.tokens[0] + chosen.tokens[1] - 1) / 2
    figures = []
    for batch, times in steps.items():
        least = None if floor is None else 1000 * floor.decode_step_s(batch, mean_context)
        median_ms = 1000 * statistics.median(times)
        figures.append(Figure(f"step_{batch}", f"decode step, batch {batch}", median_ms, "ms", least))
    details = {
        "mean_context_tokens": mean_context,
        "by_batch": {str(batch): spread_ms(times) for batch, times in steps.items()},
    }
    return Report(tuple(figures), details)
