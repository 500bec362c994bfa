"""`dist-vlm bench`: how fast this machine serves a model, each figure beside what its device could do at best."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dist_vlm.config_load import add_config_flags, config_flags, load_config
from dist_vlm.launch import bench_all, bench_latency, bench_startup, bench_steps, bench_throughput
from dist_vlm.launch.bench_engine import started_engine
from dist_vlm.launch.bench_figures import table
from dist_vlm.launch.bench_files import Target
from dist_vlm.launch.bench_task import Task

if TYPE_CHECKING:
    from dist_vlm.config import EngineConfig
    from dist_vlm.launch.bench_figures import Report
    from dist_vlm.launch.bench_rates import DeviceRates

MEASUREMENTS: dict[str, ModuleType] = {
    "throughput": bench_throughput,
    "latency": bench_latency,
    "steps": bench_steps,
    "all": bench_all,
    "startup": bench_startup,
}

_TEXT = """\
The work is built in: pictures of noise in three sizes and prompts of 48 words, each made from its number, so that all
machines do the same. Answers are greedy and go past any end of sequence. --load-format dummy measures a model of which
there is only the configuration.

On a GPU the floors come from the same run: before the engine starts, a process of its own measures how fast the device
copies and multiplies. On a CPU there are none."""


def add_command(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure throughput, latency, decode steps or the start",
        description=_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = bench.add_subparsers(metavar="MEASUREMENT", required=True, dest="measurement")
    for name, module in MEASUREMENTS.items():
        parser = verbs.add_parser(
            name,
            help=module.HELP,
            description=module.TEXT,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument("--config", metavar="FILE", help="YAML file; without it --model is needed")
        module.add_flags(parser)
        if module is bench_all:
            parser.add_argument("--out", metavar="DIR", help="also write the figures there, as NAME.json")
            parser.add_argument("--plot", metavar="DIR", help="also draw them there, as NAME.svg")
        else:
            parser.add_argument("--out", metavar="FILE", help="also write the figures there, as JSON")
            parser.add_argument("--plot", metavar="FILE.svg", help="also draw them there")
        parser.add_argument("--commit", metavar="TEXT", help="what the JSON calls the code (what git says)")
        add_config_flags(parser)
    bench.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, config_flags(arguments)).resolve()
    tasks = _tasks(arguments)
    for task in tasks:
        task.check(config)
    out, plot = _target(arguments, "--out", ".json"), _target(arguments, "--plot", ".svg")
    starts = arguments.measurement == "startup"
    # Nothing of a start is compared with them.
    rates = None if starts else _rates(config)
    for task, report in _started(tasks, config) if starts else _measured(tasks, config, rates):
        print(table(report.figures) if len(tasks) == 1 else f"{task.name}:\n{table(report.figures)}", flush=True)
        if out is not None:
            out.write(task.name, _json(task, config, report, rates=rates, commit=arguments.commit))
        if plot is not None:
            plot.write(task.name, _plot(task, config, report))


def _tasks(arguments: argparse.Namespace) -> list[Task]:
    if arguments.measurement == "all":
        return bench_all.tasks(arguments)
    module = MEASUREMENTS[arguments.measurement]
    return [Task(arguments.measurement, module, module.settings(arguments))]


def _target(arguments: argparse.Namespace, flag: str, ending: str) -> Target | None:
    path = getattr(arguments, flag.removeprefix("--"))
    if path is None:
        return None
    target = Target(flag, path, ending, is_folder=arguments.measurement == "all")
    target.check()
    return target


def _started(tasks: list[Task], config: EngineConfig) -> Iterator[tuple[Task, Report]]:
    """Of those that start a process of their own."""
    for task in tasks:
        yield task, bench_startup.measure(config, task.chosen)


def _measured(tasks: list[Task], config: EngineConfig, rates: DeviceRates | None) -> Iterator[tuple[Task, Report]]:
    """Each as soon as it is there: the next may fail."""
    with started_engine(config, rates) as engine:
        for task in tasks:
            yield task, task.measure(engine)


def _rates(config: EngineConfig) -> DeviceRates | None:
    """None on a CPU."""
    if config.parallel.device != "cuda":
        return None
    from dist_vlm.launch.bench_rates import measured_rates

    rates = measured_rates(config.model.dtype)
    copied, multiplied = rates.copy_bytes_per_s / 1e12, rates.matmul_flop_per_s / 1e12
    print(f"the device copies {copied:.3g} TB/s and multiplies {multiplied:.0f} TFLOP/s in {rates.dtype}", flush=True)
    return rates


def _json(task: Task, config: EngineConfig, report: Report, *, rates: DeviceRates | None, commit: str | None) -> str:
    from dist_vlm.launch.bench_record import record

    found = record(task.name, config, settings=asdict(task.chosen), rates=rates, commit=commit) | report.as_json()
    return json.dumps(found, indent=2, allow_nan=False) + "\n"


def _plot(task: Task, config: EngineConfig, report: Report) -> str:
    from dist_vlm.launch.bench_plot import svg

    name = os.path.basename(os.path.normpath(config.model.model))
    return svg(f"{task.name}: {name}, {config.model.dtype}, {config.parallel.device}", report.figures)
