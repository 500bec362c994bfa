"""`dist-vlm check`: this runtime against transformers' own model, on pictures and prompts made here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vlm.config import ConfigError, EngineConfig
from dist_vlm.config_load import LoadedConfig, add_config_flags, config_flags, load_config
from dist_vlm.launch.check_table import run_table
from dist_vlm.version import __version__

if TYPE_CHECKING:
    from dist_vlm.launch.compare import CheckReport
    from dist_vlm.launch.reference import ReferenceAnswer

# Likeliest tokens compared at each position.
TOP = 5
NUM_ANSWER_TOKENS = 16
# Room left for the text of a probe, template included.
_TEXT_TOKENS = 96
FLOAT32_TOLERANCE = 1e-3

_TEXT = f"""\
Compares this runtime with transformers' model of the same checkpoint, computed in float32, and fails where they
differ by more than rounding explains. For each number of ranks the runtime is started anew.

The probes are pictures of noise, shapes and gradients in several sizes, one or two in a prompt, and text alone.
transformers answers each greedily with {NUM_ANSWER_TOKENS} tokens. Then two things are measured:
  given      the runtime gets prompt and answer, and tells the log probabilities of each token and of the {TOP}
             likeliest at its place: the highest difference from transformers'
  free       the runtime answers by itself: the same difference, as long as its tokens are transformers'; how many are;
             and for the first that is not, its gap: how far its logit is below the highest in transformers
A difference of log probabilities is one of logits without what all logits of a row have in common.

The tolerance holds for differences and gaps. In float32 it is {FLOAT32_TOLERANCE:g}. In 16 bits it is measured: twice
the highest difference between transformers in that type and in float32, on the same probes, so that another order of
the same roundings passes. Exit status: 0 within the tolerance, 1 beyond it."""


def add_command(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="compare with transformers",
        description=_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    check.add_argument("--config", metavar="FILE", help="YAML file; without it --model is needed")
    check.add_argument("--ranks", type=_ranks, metavar="N,N", help="numbers of ranks (tensor_parallel_size alone)")
    check.add_argument("--probes", type=_positive, default=8, metavar="N", help="number of probes (8)")
    check.add_argument("--tolerance", type=_tolerance, metavar="X", help="in place of the default; see above")
    check.add_argument("--json", metavar="FILE", help="also write the figures there")
    check.add_argument(
        "--reference-device", choices=("cpu", "cuda"), default="cpu", help="where transformers computes (cpu)"
    )
    check.add_argument("--no-progress", action="store_true", help="show no progress bar")
    add_config_flags(check)
    check.set_defaults(run=run)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be an integer, at least 1")
    return int(text)


def _ranks(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_positive(part) for part in text.split(",")))


def _tolerance(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0")
    return number


@dataclasses.dataclass(frozen=True, slots=True)
class RankRun:
    """The check at one number of ranks. error: why it could not be made, or was broken off; else there is a report."""

    num_ranks: int
    executor: str
    report: CheckReport | None = None
    error: str | None = None

    @property
    def faults(self) -> list[str]:
        return self.report.faults if self.report is not None else [str(self.error)]


def run(arguments: argparse.Namespace) -> None:
    loaded = load_config(arguments.config, config_flags(arguments))
    configs = rank_configs(loaded, arguments.ranks or (loaded.config.parallel.tensor_parallel_size,))
    _check_servable(configs[0])
    from dist_vlm.launch.reference import release_memory

    answers, tolerance = _reference(configs[0], arguments)
    release_memory(arguments.reference_device)
    own = f"; transformers itself in {configs[0].model.dtype} differs by {tolerance / 2:.2g}"
    measured = arguments.tolerance is None and configs[0].model.dtype != "float32"
    print(f"{configs[0].model.model} in {configs[0].model.dtype}: tolerance {tolerance:.2g}{own if measured else ''}")
    runs = []
    for config in configs:
        runs.append(_run_at(config, answers, tolerance))
        print(f"\n{run_table(runs[-1])}", flush=True)
    if arguments.json is not None:
        _write(arguments.json, configs[0], runs, tolerance)
    failed = [one for one in runs if one.faults]
    if failed:
        where = " and ".join(f"{one.num_ranks} rank{'s' * (one.num_ranks > 1)}" for one in failed)
        raise RuntimeError(f"the check failed at {where}: {failed[0].faults[0]}")


def rank_configs(loaded: LoadedConfig, ranks: Sequence[int]) -> list[EngineConfig]:
    """The configuration at each number of ranks, resolved: one group, placed by Ray where it has several ranks."""
    configs = []
    for num_ranks in ranks:
        executor = loaded.config.parallel.executor if num_ranks == 1 else "ray"
        config = loaded.config.replace(tensor_parallel_size=num_ranks, executor=executor, replicas=1, num_nodes=1)
        configs.append(dataclasses.replace(loaded, config=config).resolve())
    return configs


def _check_servable(config: EngineConfig) -> None:
    """Raises `ConfigError` where there is nothing to compare."""
    if config.parallel.executor == "fake":
        raise ConfigError("must be ray or inline: the fake computes nothing", field="parallel.executor", value="fake")
    if config.model.load_format == "dummy":
        raise ConfigError("must be auto or safetensors: transformers has no such weights", field="model.load_format")
    if config.vision.image_input_type == "image_features" or config.vision.disable_image_processor:
        raise ConfigError("the configuration takes no pictures, only tensors: the check gives pictures", field="vision")


def _max_pictures(config: EngineConfig) -> int:
    """Most pictures of a probe that fits the longest sequence."""
    vision, length = config.vision, config.model.max_model_len
    if vision.image_token_id is None:
        return 0
    assert length is not None and vision.image_feature_size is not None, "resolve() decides them"
    room = length - NUM_ANSWER_TOKENS - _TEXT_TOKENS
    return min(vision.max_images_per_prompt, max(0, room) // vision.image_feature_size)


def _reference(config: EngineConfig, arguments: argparse.Namespace) -> tuple[list[ReferenceAnswer], float]:
    """What transformers answers, and the tolerance. Nobody holds its model when this returns."""
    from tqdm import tqdm

    from dist_vlm.launch.probes import make_probes
    from dist_vlm.launch.reference import Reference

    probes = make_probes(arguments.probes, max_pictures=_max_pictures(config))
    with tqdm(
        total=len(probes), desc="transformers", unit="probe", file=sys.stderr, disable=arguments.no_progress
    ) as bar:
        reference = Reference(config, device=arguments.reference_device)
        answers = []
        for probe in probes:
            answers.append(reference.answer(probe, num_tokens=NUM_ANSWER_TOKENS))
            bar.update()
    _check_lengths(config, answers)
    if arguments.tolerance is not None:
        return answers, arguments.tolerance
    if config.model.dtype == "float32":
        return answers, FLOAT32_TOLERANCE
    return answers, 2 * reference.own_difference(answers, config.model.dtype, top=TOP)


def _check_lengths(config: EngineConfig, answers: Sequence[ReferenceAnswer]) -> None:
    # The runtime judges prompt and answer together, and always generates a token more.
    needed = max(len(one.prompt_token_ids) + len(one.token_ids) for one in answers) + 1
    length = config.model.max_model_len
    if length is not None and length < needed:
        raise ConfigError(f"must be at least {needed} for the probes", field="model.max_model_len", value=length)


def _run_at(config: EngineConfig, answers: Sequence[ReferenceAnswer], tolerance: float) -> RankRun:
    """Starts the runtime and compares it. Ranks that fail are a finding, not the end of the check."""
    from dist_vlm import LLM
    from dist_vlm.executor.base import ExecutorError
    from dist_vlm.launch.compare import compare

    parallel = config.parallel
    try:
        with LLM.from_config(config) as llm:
            top = min(TOP, config.scheduler.max_logprobs)
            report = compare(answers, llm, tolerance=tolerance, top=top)
    except ExecutorError as error:
        return RankRun(parallel.tensor_parallel_size, parallel.executor, error=str(error))
    return RankRun(parallel.tensor_parallel_size, parallel.executor, report)


def _write(path: str, config: EngineConfig, runs: Sequence[RankRun], tolerance: float) -> None:
    figures = {
        "model": config.model.model,
        "dtype": config.model.dtype,
        "device": config.parallel.device,
        "versions": {"dist-vlm": __version__} | {name: version(name) for name in ("torch", "transformers")},
        "tolerance": tolerance,
        "passed": not any(one.faults for one in runs),
        "runs": [_figures(one) for one in runs],
    }
    Path(path).write_text(json.dumps(_finite(figures), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _figures(one: RankRun) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "ranks": one.num_ranks,
        "executor": one.executor,
        "passed": not one.faults,
        "faults": one.faults,
    }
    if one.report is not None:
        figures |= {
            "max_difference": one.report.max_difference,
            "max_gap": one.report.max_gap,
            "agreement": one.report.agreement,
            "probes": [dataclasses.asdict(probe) for probe in one.report.probes],
        }
    return figures


def _finite(value: Any) -> Any:
    """The same, with numbers that JSON does not have as strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
