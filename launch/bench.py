"""`dist-vlm bench`: how fast this machine serves a model, each figure beside what its device could do at best."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dist_vlm.config import ConfigError
from dist_vlm.config_load import add_config_flags, config_flags, load_config
from dist_vlm.launch import bench_latency, bench_startup, bench_steps, bench_throughput
from dist_vlm.launch.bench_figures import table

if TYPE_CHECKING:
    from dist_vlm.config import EngineConfig
    from dist_vlm.launch.bench_figures import Report
    from dist_vlm.launch.bench_rates import DeviceRates

MEASUREMENTS: dict[str, ModuleType] = {
    "throughput": bench_throughput,
    "latency": bench_latency,
    "steps": bench_steps,
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
        parser.add_argument("--out", metavar="FILE", help="also write the figures there, as JSON")
        parser.add_argument("--plot", metavar="FILE.svg", help="also draw them there")
        parser.add_argument("--commit", metavar="TEXT", help="what the JSON calls the code (what git says)")
        add_config_flags(parser)
    bench.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    module = MEASUREMENTS[arguments.measurement]
    config = load_config(arguments.config, config_flags(arguments)).resolve()
    chosen = module.settings(arguments)
    module.check(config, chosen)
    _check_files(arguments)
    rates = _rates(config, module)
    report: Report = module.measure(config, chosen, rates)
    print(table(report.figures))
    if arguments.out is not None:
        _write_json(arguments, config, report, chosen=chosen, rates=rates)
    if arguments.plot is not None:
        _write_plot(arguments, config, report)


def _check_files(arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` for files that could not be written once all is measured."""
    for flag, path in (("--out", arguments.out), ("--plot", arguments.plot)):
        if path is None:
            continue
        if not os.path.isdir(os.path.dirname(path) or ".") or os.path.isdir(path):
            raise ConfigError("must be a file in an existing directory", field=flag[2:], value=path, source=flag)
    if arguments.plot is not None and not arguments.plot.endswith(".svg"):
        raise ConfigError(
            "must end in .svg: no other form is drawn", field="plot", value=arguments.plot, source="--plot"
        )


def _rates(config: EngineConfig, module: ModuleType) -> DeviceRates | None:
    """None on a CPU, and where nothing is compared with them."""
    if config.parallel.device != "cuda" or module is bench_startup:
        return None
    from dist_vlm.launch.bench_rates import measured_rates

    rates = measured_rates(config.model.dtype)
    copied, multiplied = rates.copy_bytes_per_s / 1e12, rates.matmul_flop_per_s / 1e12
    print(f"the device copies {copied:.3g} TB/s and multiplies {multiplied:.0f} TFLOP/s in {rates.dtype}", flush=True)
    return rates


def _write_json(
    arguments: argparse.Namespace, config: EngineConfig, report: Report, *, chosen: Any, rates: DeviceRates | None
) -> None:
    from dist_vlm.launch.bench_record import record

    found = (
        record(arguments.measurement, config, settings=asdict(chosen), rates=rates, commit=arguments.commit)
        | report.as_json()
    )
    Path(arguments.out).write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _write_plot(arguments: argparse.Namespace, config: EngineConfig, report: Report) -> None:
    from dist_vlm.launch.bench_plot import svg

    name = os.path.basename(os.path.normpath(config.model.model))
    title = f"{arguments.measurement}: {name}, {config.model.dtype}, {config.parallel.device}"
    Path(arguments.plot).write_text(svg(title, report.figures), encoding="utf-8")
