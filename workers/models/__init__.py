"""The model families, one folder each. A new family is a folder and a line of `FAMILIES`."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from dist_vlm.workers.models.family import ModelFamily
from dist_vlm.workers.models.spec import CheckpointError, ModelSpec

__all__ = ["FAMILIES", "CheckpointError", "ModelFamily", "ModelSpec", "get_family", "read_spec"]

# `model_type` of a checkpoint's config.json -> module with a `FAMILY: ModelFamily`.
FAMILIES = {"llava": "dist_vlm.workers.models.llava"}


def get_family(name: str) -> ModelFamily:
    """The family registered for a `model_type`. Raises `CheckpointError` for an unknown one."""
    if name not in FAMILIES:
        raise CheckpointError(f"model_type {name!r} is not served; served are: {', '.join(sorted(FAMILIES))}")
    family: ModelFamily = importlib.import_module(FAMILIES[name]).FAMILY
    return family


def read_spec(path: str) -> ModelSpec:
    """Reads a checkpoint directory's facts. Raises `CheckpointError` naming what is missing or wrong."""
    config_file = Path(path) / "config.json"
    if not Path(path).is_dir():
        raise CheckpointError(f"model path {path!r} is not a directory")
    if not config_file.is_file():
        raise CheckpointError(f"{config_file} is missing")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError:
        raise CheckpointError(f"{config_file} is not JSON") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{config_file} has no model_type")
    return get_family(config["model_type"]).read_spec(path, config)
