"""The file of figures: how the checkpoint was trained, and what it answers right through each backend."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

FOLDER = Path(__file__).parent


def update_figures(path: Path, keys: tuple[str, ...], figures: dict[str, Any]) -> None:
    """Sets figures[keys[0]][keys[1]]... in the JSON file and leaves the rest of it as it is."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    place = content
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = figures
    path.write_text(json.dumps(content, indent=2) + "\n")


def environment(device: str, commit: str) -> dict[str, str]:
    """Hardware, versions and the code's commit, for whoever wants to repeat the figures."""
    cpu = f"CPU, {torch.get_num_threads()} threads"
    return {
        "hardware": f"one {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else cpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit,
    }


def code_commit() -> str:
    """The short hash of the last commit that changed this folder's code, or "unknown" outside a git checkout."""
    command = ["git", "-C", str(FOLDER), "log", "-1", "--format=%h", "--", "*.py"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
