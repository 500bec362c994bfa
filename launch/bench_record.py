"""What a file of figures says of where they come from."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vlm.launch.info import PACKAGES
from dist_vlm.machine import memory_bytes, nvidia_gpus, usable_cores
from dist_vlm.version import __version__

if TYPE_CHECKING:
    from dist_vlm.config import EngineConfig
    from dist_vlm.launch.bench_rates import DeviceRates

# Of the checkout this package may lie in; through the link, where there is one.
_ROOT = Path(__file__).resolve().parents[1]


def record(
    name: str,
    config: EngineConfig,
    *,
    settings: dict[str, Any],
    rates: DeviceRates | None,
    commit: str | None = None,
) -> dict[str, Any]:
    """What stands before the figures of the measurement `name`. commit: in place of what git says."""
    return {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit if commit is not None else git_commit(_ROOT),
        "machine": machine(),
        "software": software(),
        "config": config.fields(),
        "settings": settings,
        "device_rates": None
        if rates is None
        else {
            "copy_gb_per_s": round(rates.copy_bytes_per_s / 1e9, 1),
            "matmul_tflop_per_s": round(rates.matmul_flop_per_s / 1e12, 1),
            "matmul_dtype": rates.dtype,
        },
    }


def machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gib": round(memory_bytes().get("total", 0) / 2**30, 1),
        "nvidia_gpus": nvidia_gpus(),
        "system": platform.platform(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def software() -> dict[str, str | None]:
    """Versions; None for a package that is not installed."""
    return {"dist-vlm": __version__, "python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def git_commit(root: Path) -> str | None:
    """The commit of the checkout at `root`, "+changes" after it where files differ; None where there is none."""
    if _git(root, "rev-parse", "--show-toplevel") != str(root):
        return None
    commit = _git(root, "rev-parse", "--short", "HEAD")
    return commit and commit + ("+changes" if _git(root, "status", "--porcelain") else "")


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.search(r"^model name\s*:\s*(.*)$", text, flags=re.MULTILINE)
    return match[1] if match else None
