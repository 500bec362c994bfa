"""`dist-vlm info`: versions, devices, kernels, cores and memory of this machine, for a look or for a report."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dist_vlm.machine import memory_bytes, nvidia_gpus, usable_cores
from dist_vlm.version import __version__

PACKAGES = ("torch", "transformers", "ray", "triton", "numpy", "pillow", "msgpack", "safetensors")


def add_command(commands: Any) -> None:
    info = commands.add_parser("info", help="print versions, devices and kernels", allow_abbrev=False)
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    facts = collect()
    print(json.dumps(facts, indent=2) if arguments.json else _as_lines(facts))


def collect() -> dict[str, Any]:
    """Every fact. Only asking torch for its CUDA devices and the kernels imports anything heavy."""
    return {
        "dist-vlm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cores": usable_cores(),
        "memory_gib": {name: round(size / 2**30, 1) for name, size in memory_bytes().items()},
        "nvidia_gpus": nvidia_gpus(),
        "torch_cuda_devices": _torch_cuda_devices(),
        "c++ compiler": shutil.which("c++") or shutil.which("g++"),
        "kernels": _kernels(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch_cuda_devices() -> int | None:
    """CUDA devices torch can use, or None where torch is not installed. A CPU build counts 0."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    return int(torch.cuda.device_count())


def _kernels() -> dict[str, dict[str, str]]:
    """Implementation -> op -> the function that a rank would run."""
    choice, torch = importlib.import_module("dist_vlm.kernels.choice"), importlib.import_module("torch")
    found = {name: ops.names for name, ops in choice.IMPLEMENTATIONS.items()}
    if torch.cuda.is_available() and "triton" in choice.allowed_names("cuda"):
        found["triton"] = choice.choose("triton", "cuda").names
    return found


def _as_lines(facts: dict[str, Any], indent: str = "") -> str:
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}:", _as_lines(value, indent + "  ")]
        else:
            shown = ", ".join(value) if isinstance(value, list) else value
            lines.append(f"{indent}{name}: {'none' if shown in (None, '', {}) else shown}")
    return "\n".join(lines)
