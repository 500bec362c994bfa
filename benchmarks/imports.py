"""What processes import before they do anything: processor seconds and modules, each in fresh processes. Prints JSON.

A rank imports what its worker, its runner and the model family need; a driver what its configuration, the tokenizer and
the image processor do. Trees of other commits are measured by turns with this one, which on a machine that is shared is
the only way to compare them:

    python benchmarks/imports.py --rounds 5 --trees . ../before
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from dist_vlm.launch.bench_flags import whole
from dist_vlm.launch.bench_record import git_commit, machine, software

RANK = """
import dist_vlm.workers.worker, dist_vlm.workers.runner
from dist_vlm.workers.models import get_family
get_family("llava").preload()
"""
DRIVER = """
import os
from dist_vlm.config import EngineConfig, resolve
from dist_vlm.engine.front import load_front
fields = {"model": os.environ["IMPORTS_MODEL"], "executor": "fake", "device": "cpu"}
load_front(resolve(EngineConfig.from_fields(**fields)), serves_logits_processors=False)
"""
TELL = """
import json, sys, time
print(json.dumps([time.process_time(), len(sys.modules)]))
"""
PROGRAMS = {"rank": RANK + TELL, "driver": DRIVER + TELL}


def once(program: str, tree: Path, model: Path) -> tuple[float, int]:
    """Processor seconds of a fresh process and the modules it has in the end, with the package of a tree."""
    environment = os.environ | {"PYTHONPATH": str(tree), "IMPORTS_MODEL": str(model)}
    command = [sys.executable, "-c", program]
    told = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=True).stdout
    seconds, modules = json.loads(told.splitlines()[-1])
    return seconds, modules


def measure(trees: list[Path], model: Path, rounds: int) -> list[dict[str, Any]]:
    found = []
    for name, program in PROGRAMS.items():
        seconds: dict[Path, list[float]] = {tree: [] for tree in trees}
        modules: dict[Path, int] = {}
        for number in range(1 + rounds):
            for tree in trees:
                took, modules[tree] = once(program, tree, model)
                if number:  # the first fills caches, of the disk and of the user
                    seconds[tree].append(took)
        for tree in trees:
            found.append(
                {
                    "process": name,
                    "commit": git_commit(tree),
                    "processor_seconds": [round(took, 3) for took in seconds[tree]],
                    "median": round(statistics.median(seconds[tree]), 3),
                    "modules": modules[tree],
                }
            )
    return found


def main() -> None:
    here = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=whole(1), default=5, help="processes of each kind and tree that count")
    parser.add_argument("--trees", type=Path, nargs="+", default=[here], help="checkouts to measure by turns")
    parser.add_argument("--model", type=Path, default=here / "examples" / "demo" / "checkpoint")
    arguments = parser.parse_args()
    facts = {"benchmark": "imports", "command": " ".join(sys.argv), "machine": machine(), "software": software()}
    found = measure([tree.resolve() for tree in arguments.trees], arguments.model.resolve(), arguments.rounds)
    print(json.dumps(facts | {"results": found}, indent=1))


if __name__ == "__main__":
    main()
