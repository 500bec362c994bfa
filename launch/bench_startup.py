"""`dist-vlm bench startup`: from the start of a process to the first token, and how smoothly it goes on from there."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vlm.launch.bench_engine import check_pictures_fit
from dist_vlm.launch.bench_figures import Figure, Report, percentile, rounded
from dist_vlm.launch.bench_flags import Flags, whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dist_vlm.config import EngineConfig

HELP = "from the start of a process to the first token, and the longest stall after it"
TEXT = """\
Starts a process that starts the engine and answers a request with a picture; nothing is warmed up. The time to its
first token is counted from the start of the process. Then come the other requests, several in flight at any time: a
stall is the time from one piece of news to the next, whichever requests they are of; the first one counts from the
moment at which the requests were given."""

_CHILD = "dist_vlm.launch.bench_started"


@dataclass(frozen=True, slots=True)
class Settings:
    requests: int
    in_flight: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Started:
    """What the started process tells. Moments are of `time.monotonic()`, which all processes of a machine share.

    news: when the requests after the first were given, then each moment at which a request had news, in order.
    stages: of the executor's start -> seconds.
    """

    ready: float
    first_token: float
    first_ended: float
    news: list[float]
    num_tokens: int
    stages: dict[str, float]


def add_flags(parser: Flags) -> None:
    parser.add_argument("--requests", type=whole(1), default=200, metavar="N", help="requests after the first (200)")
    parser.add_argument("--in-flight", type=whole(1), default=8, metavar="N", help="of them at the same time (8)")
    parser.add_argument("--output-tokens", type=whole(1), default=64, metavar="N", help="tokens of each answer (64)")


def settings(arguments: argparse.Namespace) -> Settings:
    return Settings(arguments.requests, arguments.in_flight, arguments.output_tokens)


def check(config: EngineConfig, chosen: Settings) -> None:
    check_pictures_fit(config, num_tokens=chosen.output_tokens)


def measure(config: EngineConfig, chosen: Settings) -> Report:
    with tempfile.TemporaryDirectory(prefix="dist-vlm-bench-") as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "result.json"
        job.write_text(json.dumps({"config": config.fields(), "settings": asdict(chosen)}), encoding="utf-8")
        began = time.monotonic()
        # Its output is no part of ours, its complaints are.
        done = subprocess.run(
            [sys.executable, "-m", _CHILD, str(job), str(result)], stdout=subprocess.DEVNULL, check=False
        )
        if not result.exists():
            raise RuntimeError(f"the started process ended with status {done.returncode}")
        found = json.loads(result.read_text(encoding="utf-8"))
    if "error" in found:
        raise RuntimeError(f"the started process failed: {found['error']}")
    return report(Started(**found), began)


def report(started: Started, began: float) -> Report:
    """began: the moment at which the process was started."""
    gaps = stalls(started.news)
    seconds = started.news[-1] - started.news[0]
    figures = (
        Figure("ready", "process start to ready", started.ready - began, "s"),
        Figure("first_token", "process start to first token", started.first_token - began, "s"),
        Figure("longest_stall", "longest stall after it", 1000 * max(gaps), "ms"),
        Figure("stall_p99", "99 % of the gaps are within", 1000 * percentile(gaps, 0.99), "ms"),
    )
    details: dict[str, Any] = {
        "first_answer_s": rounded(started.first_ended - began),
        "start_stages_s": started.stages,
        "seconds": rounded(seconds),
        "output_tokens": started.num_tokens,
        "longest_stalls": [
            {"at_s": rounded(at), "ms": rounded(1000 * gap)} for gap, at in _longest(started.news, count=5)
        ],
    }
    return Report(figures, details)


def stalls(news: Sequence[float]) -> list[float]:
    """Seconds between one moment and the next."""
    return [after - before for before, after in pairwise(news)]


def _longest(news: Sequence[float], *, count: int) -> list[tuple[float, float]]:
    """The longest stalls, each with the time from the first moment to its beginning."""
    gaps = [(after - before, before - news[0]) for before, after in pairwise(news)]
    return sorted(gaps, reverse=True)[:count]
