"""`dist-vlm bench throughput`: many requests at once."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_vlm.launch.bench_engine import MeasuredEngine, Timed, check_pictures_fit
from dist_vlm.launch.bench_figures import Figure, Report, percentile, rounded, spread_ms
from dist_vlm.launch.bench_flags import Flags, whole
from dist_vlm.launch.bench_workload import THROUGHPUT, WARM_UP, requests

if TYPE_CHECKING:
    from dist_vlm.config import EngineConfig
    from dist_vlm.launch.bench_floor import Floor

HELP = "many requests at once: requests and tokens in a second"
TEXT = """\
Answers all requests in one call, each with a picture of its own that the engine has not seen, after a warm-up with
other pictures. The time is that of the call: preparing the pictures is part of it, making them is not.

The floor: prefill at the measured FLOP/s, then decode steps of full batches at the measured bandwidth, one after the
other."""


@dataclass(frozen=True, slots=True)
class Settings:
    requests: int
    output_tokens: int
    warm_up: int


def add_flags(parser: Flags) -> None:
    parser.add_argument("--requests", type=whole(1), default=512, metavar="N", help="requests (512)")
    parser.add_argument("--output-tokens", type=whole(1), default=128, metavar="N", help="tokens of each answer (128)")
    parser.add_argument("--warm-up", type=whole(1), default=64, metavar="N", help="requests before the measured (64)")


def settings(arguments: argparse.Namespace) -> Settings:
    return Settings(arguments.requests, arguments.output_tokens, arguments.warm_up)


def check(config: EngineConfig, chosen: Settings) -> None:
    check_pictures_fit(config, num_tokens=chosen.output_tokens)


def measure(engine: MeasuredEngine, chosen: Settings) -> Report:
    timed, num_tokens = engine.timed(), chosen.output_tokens
    warm_up = requests(range(THROUGHPUT + WARM_UP, THROUGHPUT + WARM_UP + chosen.warm_up))
    timed.run(warm_up[:1], num_tokens)  # alone: the smallest batches
    if warm_up[1:]:
        timed.run(warm_up[1:], num_tokens)
    found = timed.run(requests(range(THROUGHPUT, THROUGHPUT + chosen.requests)), num_tokens)
    batch = min(chosen.requests, engine.config.scheduler.max_num_seqs)
    return report(found, engine.floor, batch=batch).also(engine=engine.facts())


def report(timed: Timed, floor: Floor | None, *, batch: int) -> Report:
    """batch: sequences of a full decode step."""
    count, outputs, prompts = len(timed.outputs), timed.num_output_tokens, timed.num_prompt_tokens
    least_s = None
    if floor is not None:
        least_s = floor.throughput_s(count, prompts / count, num_outputs=outputs // count, batch=batch)

    def rate(name: str, label: str, number: int, unit: str) -> Figure:
        best = None if least_s is None else number / least_s
        return Figure(name, label, number / timed.seconds, unit, best, is_rate=True)

    figures = (
        rate("requests_per_s", "requests", count, "req/s"),
        rate("output_tokens_per_s", "output tokens", outputs, "tok/s"),
        rate("prompt_tokens_per_s", "prompt tokens", prompts, "tok/s"),
        Figure("seconds", "all of them", timed.seconds, "s", least_s),
    )
    first = timed.first_token_s
    details = {
        "prompt_tokens": prompts,
        "output_tokens": outputs,
        "first_token": spread_ms(first) | {"p99_ms": rounded(1000 * percentile(first, 0.99))},
        **timed.books(),
    }
    return Report(figures, details)
