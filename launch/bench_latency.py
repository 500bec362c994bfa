"""`dist-vlm bench latency`: one request at a time."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dist_vlm.launch.bench_engine import MeasuredEngine, TimedEngine, check_pictures_fit
from dist_vlm.launch.bench_figures import Figure, Report, spread_ms
from dist_vlm.launch.bench_flags import Flags, whole
from dist_vlm.launch.bench_workload import LATENCY, SIZES, WARM_UP, request

if TYPE_CHECKING:
    from dist_vlm.config import EngineConfig
    from dist_vlm.launch.bench_floor import Floor

HELP = "one request at a time: time to the first token, and for each further one"
TEXT = f"""\
Each round asks for one token, then for a whole answer, about pictures that the engine has not seen: two of the same
size, with the same words. The time to the first token is that of the first call, from a picture in memory; the time
for each further token is (second call - first call) / (tokens - 1). Sizes take turns:
{", ".join(f"{width}x{height}" for width, height in SIZES)}.

The floors: prefill and the vision encoder at the measured FLOP/s; a read of the weights and of the keys and values at
the measured bandwidth."""


@dataclass(frozen=True, slots=True)
class Settings:
    rounds: int
    output_tokens: int
    warm_up: int


@dataclass(frozen=True, slots=True)
class Round:
    """One pair of calls. size: "640x480". Times in seconds."""

    size: str
    num_prompt_tokens: int
    first_s: float
    per_token_s: float


def add_flags(parser: Flags) -> None:
    parser.add_argument("--rounds", type=whole(1), default=10, metavar="N", help="pairs of requests (10)")
    parser.add_argument("--output-tokens", type=whole(2), default=128, metavar="N", help="tokens of each answer (128)")
    parser.add_argument("--warm-up", type=whole(1), default=3, metavar="N", help="pairs before the measured ones (3)")


def settings(arguments: argparse.Namespace) -> Settings:
    return Settings(arguments.rounds, arguments.output_tokens, arguments.warm_up)


def check(config: EngineConfig, chosen: Settings) -> None:
    check_pictures_fit(config, num_tokens=chosen.output_tokens)


def measure(engine: MeasuredEngine, chosen: Settings) -> Report:
    timed, num_tokens = engine.timed(), chosen.output_tokens
    run_rounds(timed, chosen.warm_up, num_tokens=num_tokens, first=LATENCY + WARM_UP)
    rounds = run_rounds(timed, chosen.rounds, num_tokens=num_tokens, first=LATENCY)
    return report(rounds, engine.floor, num_tokens=num_tokens).also(engine=engine.facts())


def run_rounds(engine: TimedEngine, count: int, *, num_tokens: int, first: int) -> list[Round]:
    """first: number of the first request; the pictures of the second calls follow on those of the first ones."""
    apart = -(-count // len(SIZES)) * len(SIZES)  # a multiple of the sizes, so that both pictures have the same
    rounds = []
    for index in range(first, first + count):
        one = engine.run([request(index)], 1)
        whole_answer = engine.run([request(index + apart, text_of=index)], num_tokens)
        width, height = SIZES[index % len(SIZES)]
        per_token_s = (whole_answer.seconds - one.seconds) / (num_tokens - 1)
        rounds.append(Round(f"{width}x{height}", one.num_prompt_tokens, one.seconds, per_token_s))
    return rounds


def report(rounds: Sequence[Round], floor: Floor | None, *, num_tokens: int) -> Report:
    by_size = {size: [one for one in rounds if one.size == size] for size in dict.fromkeys(one.size for one in rounds)}
    figures = [*_figures(rounds, floor, num_tokens=num_tokens)]
    for size, some in by_size.items():
        figures += _figures(some, floor, num_tokens=num_tokens, size=size)
    details = {**_spreads(rounds), "by_size": {size: _spreads(some) for size, some in by_size.items()}}
    return Report(tuple(figures), details)


def _figures(rounds: Sequence[Round], floor: Floor | None, *, num_tokens: int, size: str = "") -> list[Figure]:
    """Medians."""
    length = statistics.mean(one.num_prompt_tokens for one in rounds)
    least_first = least_next = None
    if floor is not None:
        least_first = 1000 * floor.prefill_s(length)
        least_next = 1000 * floor.decode_step_s(1, length + num_tokens / 2)
    name, label = (f"_{size}", f", {size}") if size else ("", "")
    first_ms = 1000 * statistics.median(one.first_s for one in rounds)
    next_ms = 1000 * statistics.median(one.per_token_s for one in rounds)
    return [
        Figure(f"first_token{name}", f"first token{label}", first_ms, "ms", least_first),
        Figure(f"per_token{name}", f"each further one{label}", next_ms, "ms", least_next),
    ]


def _spreads(rounds: Sequence[Round]) -> dict[str, Any]:
    return {
        "first_token": spread_ms([one.first_s for one in rounds]),
        "per_token": spread_ms([one.per_token_s for one in rounds]),
        "prompt_tokens": sorted(one.num_prompt_tokens for one in rounds),
    }
