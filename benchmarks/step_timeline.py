"""Where each microsecond of a decode step goes, on the device of rank 0: a table by kernel, and when nothing runs.

    python benchmarks/step_timeline.py --config configs/llava-1.5-7b-1gpu.yaml --model DIR --load-format dummy
    python benchmarks/step_timeline.py --config configs/demo.yaml --first aten::lt --last aten::isfinite

The engine is the ordinary one, two steps in flight: rank 0's runner times steps of each batch size, then profiles as
many. A step lasts from the beginning of its first kernel to that of the next step's; it is idle while no kernel and no
copy runs, on whatever stream. A kernel that starts before the one before it has ended counts from there, waiting
included, so that all of them together may be more than the step. Profiling makes kernels of a graph begin later, so the
time of the same steps without it stands beside. On a CPU there are operators in place of kernels, one in another.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from profiling_runner import WISH
from timeline import Event, timeline

from dist_vlm import LLM
from dist_vlm.config import ConfigError, EngineConfig
from dist_vlm.config_load import add_config_flags, config_flags, load_config
from dist_vlm.engine.rank_config import rank_config
from dist_vlm.executor.base import Executor
from dist_vlm.executor.inline import InlineExecutor
from dist_vlm.executor.ray import RayExecutor
from dist_vlm.launch.bench_engine import check_output, greedy
from dist_vlm.launch.bench_flags import whole
from dist_vlm.launch.bench_record import record
from dist_vlm.launch.bench_steps import Prompts
from dist_vlm.workers.models import read_spec

RUNNER = "profiling_runner:ProfilingRunner"
# Short names: of the kernel that finds a step's tokens, and of the one that chooses the next.
FIRST, LAST = "_decode_inputs_kernel", "_greedy_kernel"
# Of a trace: what ran on the device, which is a CPU's operators where there is no other.
CATEGORIES = {"cuda": ("kernel", "gpu_memcpy", "gpu_memset"), "cpu": ("cpu_op",)}
# Steps of a profile at whose beginning the profiler may still be starting.
UNSETTLED = 4
# Steps in which a batch may not be whole yet, or no more.
MARGIN = 32


def executor_for(config: EngineConfig) -> Executor:
    """The configured one, with a runner that profiles."""
    parallel, ranks = config.parallel, rank_config(config, read_spec(config.model.model))
    num_blocks, in_flight = config.cache.num_gpu_blocks_override, config.scheduler.max_steps_in_flight
    if parallel.executor == "inline":
        return InlineExecutor(ranks, num_blocks=num_blocks, max_steps_in_flight=in_flight, runner=RUNNER)
    if parallel.executor == "ray":
        return RayExecutor(
            ranks,
            num_blocks=num_blocks,
            max_steps_in_flight=in_flight,
            runner=RUNNER,
            ray_address=parallel.ray_address,
            start_timeout_s=parallel.start_timeout_s,
            step_timeout_s=parallel.step_timeout_s,
            transport=parallel.transport,
        )
    raise ConfigError("must be ray or inline", field="parallel.executor", value=parallel.executor)


def run_batches(config: EngineConfig, arguments: argparse.Namespace) -> None:
    num_tokens = arguments.skip + 2 * arguments.steps + 2 * MARGIN
    with LLM.from_config(config, executor=executor_for(config)) as llm:
        prompts = Prompts(llm.get_tokenizer(), num_tokens=arguments.prompt_tokens)
        for batch in arguments.batches:
            for output in llm.generate(prompts.take(batch), greedy(num_tokens), use_tqdm=False):
                check_output(output, num_tokens)


def events_of(trace: Path, device: str) -> Iterator[Event]:
    for event in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") in CATEGORIES[device]:
            yield event["name"], event["ts"], event["ts"] + event["dur"]


def tables(folder: Path, device: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints each batch's, and returns it as JSON. Raises `RuntimeError` for a batch that was never profiled."""
    found = []
    for batch in arguments.batches:
        facts = folder / f"{batch}.json"
        if not facts.exists():
            raise RuntimeError(f"there were never {arguments.skip + 2 * arguments.steps} steps of {batch} in turn")
        events = list(events_of(folder / f"{batch}.trace.json", device))
        table = timeline(events, first=arguments.first, last=arguments.last, skip=UNSETTLED)
        unprofiled_us = json.loads(facts.read_text())["unprofiled_us"]
        # Of a step without the profiler, as far as what runs in it takes as long.
        idle_us = unprofiled_us - table.busy_us
        without = f"{unprofiled_us:.1f} us, {idle_us:.1f} more than is busy ({100 * idle_us / unprofiled_us:.1f} %)"
        print(f"batch {batch}; without the profiler a step takes {without}\n{table.text()}\n", flush=True)
        bare = {"unprofiled_us": round(unprofiled_us, 1), "unprofiled_idle_us": round(idle_us, 1)}
        found.append({"batch": batch} | bare | table.as_json())
    return found


def measure(config: EngineConfig, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    wish = {"folder": str(folder), "batches": arguments.batches, "skip": arguments.skip, "steps": arguments.steps}
    os.environ[WISH] = json.dumps(wish)
    for batch in arguments.batches:  # of an earlier run
        for name in (f"{batch}.json", f"{batch}.trace.json"):
            (folder / name).unlink(missing_ok=True)
    # Ranks import the runner by its name.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    # What traces kernels stays once it is there: it does not come back well beside recordings.
    os.environ |= {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
    run_batches(config, arguments)
    return tables(folder, config.parallel.device, arguments)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file; without it --model is needed")
    parser.add_argument("--batches", type=whole(1), nargs="+", default=[1, 64], help="sequences of a step")
    parser.add_argument("--prompt-tokens", type=whole(1), default=32)
    parser.add_argument("--steps", type=whole(UNSETTLED + 2), default=48, help="timed, and then profiled")
    parser.add_argument("--skip", type=whole(1), default=16, help="steps before them")
    parser.add_argument("--first", default=FIRST, help="short name of a step's first kernel")
    parser.add_argument("--last", default=LAST, help="short name of a step's last kernel but copies")
    parser.add_argument("--traces", type=Path, help="folder in which the traces stay, for chrome://tracing")
    parser.add_argument("--commit", help="in place of what git says")
    parser.add_argument("--out", type=Path, help="also write JSON there")
    add_config_flags(parser)
    return parser.parse_args(words)


def check(config: EngineConfig, arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` for what the configuration cannot do."""
    most, longest = config.scheduler.max_num_seqs, config.model.max_model_len
    if max(arguments.batches) > most:
        problem = f"must be at most scheduler.max_num_seqs, which is {most}"
        raise ConfigError(problem, field="batches", value=max(arguments.batches), source="--batches")
    num_tokens = arguments.prompt_tokens + arguments.skip + 2 * arguments.steps + 2 * MARGIN
    if longest is not None and num_tokens > longest:
        problem = (
            f"must be at most {(longest - num_tokens) // 2 + arguments.steps}: a sequence has {longest} tokens at most"
        )
        raise ConfigError(problem, field="steps", value=arguments.steps, source="--steps")


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(words)
    config = load_config(arguments.config, config_flags(arguments)).resolve()
    check(config, arguments)
    with tempfile.TemporaryDirectory() as folder:
        kept = arguments.traces or Path(folder)
        kept.mkdir(exist_ok=True)
        found = measure(config, arguments, kept.resolve())
    if arguments.out is not None:
        named = ("batches", "prompt_tokens", "steps", "skip", "first", "last")
        settings = {name: getattr(arguments, name) for name in named}
        facts = record("step_timeline", config, settings=settings, rates=None, commit=arguments.commit)
        arguments.out.write_text(json.dumps(facts | {"tables": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
