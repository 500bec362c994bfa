"""What a submitted job takes along: this package, the launch file, and what the user names."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import dist_vlm
from dist_vlm.config_environment import API_KEY, api_key
from dist_vlm.config_load import SERVER_RULES, LoadedConfig, section_of

LAUNCH_FILE = "dist-vlm-launch.yaml"
# What a server needs to end after its requests have.
_ENDING_S = 10


def packed(
    loaded: LoadedConfig,
    folder: Path,
    *,
    working_dir: str | None,
    drain_timeout_s: float,
    variables: Mapping[str, str],
    environ: Mapping[str, str],
) -> dict[str, Any]:
    """Ray's runtime environment of a job, from files in `folder`, which must live until the job is submitted.

    The package goes as a directory, since Ray would install a wheel with all that it depends on: the cluster has
    torch, transformers and the others itself. A key that clients must send goes as a variable: everybody who may ask
    Ray for its jobs can read it, and they can run what they like in the cluster anyway.

    loaded: the launch file alone, without flags. working_dir: a folder whose content goes along, less what its
        .gitignore and .rayignore name. drain_timeout_s: the server's, flags included.
    Raises `ConfigError` for a key in the environment that no client could send.
    """
    shutil.copytree(
        Path(dist_vlm.__file__).parent,
        folder / "package" / "dist_vlm",
        ignore=shutil.ignore_patterns("__pycache__", "*.so"),
    )
    work = folder / "work"
    if working_dir is None:
        work.mkdir()
    else:
        shutil.copytree(working_dir, work, symlinks=True)
    (work / LAUNCH_FILE).unlink(missing_ok=True)  # a link would lead to the user's own file
    (work / LAUNCH_FILE).write_text(launch_text(loaded), encoding="utf-8")
    _keep_launch_file(work)
    key = loaded.server.api_key or api_key(environ)
    wait_s = math.ceil(drain_timeout_s) + _ENDING_S
    return {
        "py_modules": [str(folder / "package" / "dist_vlm")],
        "working_dir": str(work),
        "env_vars": {
            # How long Ray waits after a SIGTERM before it kills.
            "RAY_JOB_STOP_WAIT_TIME_S": str(wait_s),
            **({} if key is None else {API_KEY[0]: key}),
            **variables,
        },
    }


def launch_text(loaded: LoadedConfig) -> str:
    """What the launch file gives, relative paths made absolute, without the key."""
    fields = loaded.config.fields() | {name: getattr(loaded.server, name) for name in SERVER_RULES}
    sections: dict[str, dict[str, Any]] = {}
    for name in loaded.sources:
        if name != "api_key":
            value = fields[name]
            sections.setdefault(section_of(name), {})[name] = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)


def _keep_launch_file(work: Path) -> None:
    """Ray leaves out what these files name, and *.yaml may well be in them."""
    for ignore in (work / ".gitignore", work / ".rayignore"):
        if ignore.is_file():
            text = ignore.read_text(encoding="utf-8", errors="surrogateescape")
            ignore.unlink()  # a link would lead to the user's own file
            ignore.write_text(f"{text}\n!/{LAUNCH_FILE}\n", encoding="utf-8", errors="surrogateescape")


def is_relative(path: str) -> bool:
    return not os.path.isabs(os.path.expanduser(path))
