"""`dist-vlm bench all`: several measurements of one engine, which costs its start once."""

from __future__ import annotations

import argparse
from types import ModuleType
from typing import Any

from dist_vlm.launch import bench_latency, bench_steps, bench_throughput
from dist_vlm.launch.bench_flags import Flags
from dist_vlm.launch.bench_task import Task

# In the order in which they run.
MEASUREMENTS: dict[str, ModuleType] = {
    "latency": bench_latency,
    "steps": bench_steps,
    "throughput": bench_throughput,
}
HELP = f"{', '.join(MEASUREMENTS)} of one engine"
TEXT = """\
Starts one engine, measures the floors once, and runs the measurements one after the other: each does what it does by
itself, with requests that no other one has, and writes a file of its own, which has the same form. Their flags have
their name before them."""


class _Named:
    """Adds a measurement's flags under other names: --rounds as --latency-rounds."""

    def __init__(self, flags: Flags, name: str) -> None:
        self._flags, self._name = flags, name

    def add_argument(self, *names: str, **options: Any) -> Any:
        return self._flags.add_argument(*(_prefix(self._name) + name.removeprefix("--") for name in names), **options)


def _prefix(name: str) -> str:
    return f"--{name}-"


def _names(text: str) -> tuple[str, ...]:
    """Reads names of measurements with commas between them. In their order here, each once."""
    given = text.split(",")
    for name in given:
        if name not in MEASUREMENTS:
            raise argparse.ArgumentTypeError(f"{name!r}: must be of {', '.join(MEASUREMENTS)}")
    return tuple(name for name in MEASUREMENTS if name in given)


def add_flags(parser: Flags) -> None:
    every = ",".join(MEASUREMENTS)
    parser.add_argument("--only", type=_names, default=_names(every), metavar="NAME,NAME", help=f"of them ({every})")
    for name, module in MEASUREMENTS.items():
        module.add_flags(_Named(parser, name))


def tasks(arguments: argparse.Namespace) -> list[Task]:
    found = []
    for name in arguments.only:
        beginning = f"{name}_"
        own = {
            key.removeprefix(beginning): value for key, value in vars(arguments).items() if key.startswith(beginning)
        }
        module = MEASUREMENTS[name]
        found.append(Task(name, module, module.settings(argparse.Namespace(**own)), _prefix(name)))
    return found
