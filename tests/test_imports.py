"""Imports go one way: launch, dist_vlm, workers, kernels; inside the driver llm and server, engine, leaves."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("kernels", "workers", "driver", "launch")
# Driver packages by level; a module not named here (config, inputs, outputs, ...) is common ground for all of them.
LEVELS = {"sched": 1, "executor": 1, "media": 1, "engine": 2, "llm": 3, "async_llm": 3, "server": 3, "entrypoints": 3}
COMMON = 0
FORBIDDEN_IN_SCHED = ("torch", "ray", "transformers")
GRAPH_NAMES = ("experimental_compile", "ray.dag", "ray.experimental.channel", "ray.experimental.compiled_dag_ref")
GRAPH_HOME = "dist_vlm.executor.transport"


def modules() -> dict[str, Path]:
    """Import name -> file, of everything installed. The links inside dist_vlm/ are read at their targets."""
    found = {}
    for top in ("dist_vlm", "workers", "kernels", "launch"):
        for file in sorted((ROOT / top).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            if top == "dist_vlm" and len(parts) > 1 and parts[1] in ("workers", "kernels", "launch"):
                continue
            name = ".".join(parts if top == "dist_vlm" else ("dist_vlm", *parts)).removesuffix(".__init__")
            found[name] = file
    return found


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names that `tree` imports, in functions and under TYPE_CHECKING too; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def floor(name: str) -> int:
    part = (name.split(".") + [""])[1]
    return FLOORS.index(part if part in FLOORS else "driver")


def level(name: str) -> int:
    parts = name.split(".")
    if len(parts) == 1 or name.split(".")[1][:1].isupper():
        return max(LEVELS.values())  # the root re-exports the public names
    return LEVELS.get(parts[1], COMMON)


def problems(name: str, tree: ast.AST) -> list[str]:
    """What is wrong with the imports of module `name`."""
    found = []
    for target in imported(tree):
        if target.startswith("."):
            found.append(f"{name}: relative import of {target}")
        if name.startswith("dist_vlm.sched") and target.split(".")[0] in FORBIDDEN_IN_SCHED:
            found.append(f"{name}: the scheduler imports {target}")
        if target.split(".")[0] in ("workers", "kernels", "launch"):
            found.append(f"{name}: {target} must be imported as dist_vlm.{target}")
        if target.split(".")[0] == "dist_vlm":
            found += back_edges(name, target)
    return found


def back_edges(name: str, target: str) -> list[str]:
    if target.startswith("dist_vlm.version"):
        return []  # a constant that stands below every floor
    if floor(target) > floor(name):
        return [f"{name} ({FLOORS[floor(name)]}) imports {target} ({FLOORS[floor(target)]})"]
    if floor(name) != floor(target) or FLOORS[floor(name)] != "driver" or name == "dist_vlm":
        return []
    higher = level(target) > level(name)
    beside = level(target) == level(name) == 1 and target.split(".")[1] != name.split(".")[1]
    return [f"{name} imports {target}: against the order llm, server -> engine -> leaves"] if higher or beside else []


def graph_uses(tree: ast.AST) -> list[str]:
    """Names of Ray's compiled graphs that `tree` imports or reaches for."""
    attributes = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    dotted = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    reached = [*imported(tree), *attributes, *dotted]
    return [name for name in reached if any(name == one or name.startswith(one + ".") for one in GRAPH_NAMES)]


def test_no_module_imports_against_the_order() -> None:
    found = [line for name, file in modules().items() for line in problems(name, ast.parse(file.read_text()))]
    assert not found, "\n".join(found)


def test_the_walk_sees_every_floor() -> None:
    seen = {FLOORS[floor(name)] for name in modules()}
    assert seen == set(FLOORS)
    assert "dist_vlm.workers.plan" in modules()
    assert "dist_vlm.sched.scheduler" in modules()


def test_only_the_transport_knows_compiled_graphs() -> None:
    users = {name for name, file in modules().items() if graph_uses(ast.parse(file.read_text()))}
    assert users <= {GRAPH_HOME}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dist_vlm.workers.runner", "from dist_vlm.sched import Scheduler"),
        ("dist_vlm.workers.runner", "def f():\n    import dist_vlm.config"),
        ("dist_vlm.workers.runner", "from dist_vlm import config"),
        ("dist_vlm.kernels.rotary", "from dist_vlm.workers import plan"),
        ("dist_vlm.engine.core", "import dist_vlm.launch.cli"),
        ("dist_vlm.engine.core", "from dist_vlm.llm import LLM"),
        ("dist_vlm.engine.core", "from dist_vlm import LLM"),
        ("dist_vlm.executor.ray", "from dist_vlm.engine.core import Core"),
        ("dist_vlm.executor.ray", "from dist_vlm.sched.request import Request"),
        ("dist_vlm.config", "from dist_vlm.engine import arg_utils"),
        ("dist_vlm.sched.scheduler", "import torch"),
        ("dist_vlm.sched.scheduler", "from ray import get"),
        ("dist_vlm.sched.scheduler", "from .request import Request"),
        ("dist_vlm.engine.core", "from workers.plan import StepPlan"),
    ],
)
def test_a_back_edge_is_found(module: str, source: str) -> None:
    assert problems(module, ast.parse(source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dist_vlm.launch.generate", "from dist_vlm import LLM"),
        ("dist_vlm.llm", "from dist_vlm.engine.core import Core"),
        ("dist_vlm.engine.core", "from dist_vlm.executor.base import Executor"),
        ("dist_vlm.sched.scheduler", "from dist_vlm.workers.plan import StepPlan"),
        ("dist_vlm.executor.ray", "from dist_vlm.config import EngineConfig\nimport ray"),
        ("dist_vlm.workers.models", "from dist_vlm.kernels.choice import OpSet"),
    ],
)
def test_a_downward_import_is_allowed(module: str, source: str) -> None:
    assert not problems(module, ast.parse(source))


@pytest.mark.parametrize(
    "source",
    ["from ray.dag import InputNode", "graph = node.experimental_compile()", "import ray\nray.dag.InputNode()"],
)
def test_a_use_of_compiled_graphs_is_found(source: str) -> None:
    assert graph_uses(ast.parse(source))


def test_importing_the_scheduler_loads_no_torch_and_no_ray() -> None:
    names = [name for name in modules() if name.startswith("dist_vlm.sched")]
    code = f"import importlib, sys\nfor n in {names!r}: importlib.import_module(n)\n"
    code += f"print([m for m in {FORBIDDEN_IN_SCHED!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_every_package_has_an_init_file() -> None:
    folders = {file.parent for file in modules().values()}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]


@pytest.mark.parametrize("name", ["workers", "kernels", "launch"])
def test_a_floor_is_a_link_into_the_one_import_root(name: str) -> None:
    link = ROOT / "dist_vlm" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert (ROOT / name / "__init__.py").read_text() == ""
