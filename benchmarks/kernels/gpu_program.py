"""What programs that measure ops on a GPU share: the flags --commit and --out, and what their JSON begins with."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from dist_vlm.launch.bench_record import git_commit

ROOT = Path(__file__).resolve().parents[2]


def run(parser: argparse.ArgumentParser, report: Callable[[argparse.Namespace], dict[str, Any]]) -> None:
    """Parses the command line, measures by `report`, and writes what it returns where --out says. An error without a
    GPU."""
    parser.add_argument("--commit", help="in place of what git says")
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    measured = about(arguments.commit) | report(arguments)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


def about(commit: str | None) -> dict[str, Any]:
    """When, of what and with what. commit: None for git's."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(ROOT) if commit is None else commit,
        "device": torch.cuda.get_device_name(),
        "software": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
    }
