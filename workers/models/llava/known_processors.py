"""What was found out about image processors of transformers, kept on disk: to ask one takes seconds of imports.

An entry says of a checkpoint's settings that `ScaledCrop` gives what transformers does, and with which numbers. It is
looked up by all that this depends on: the settings, the versions of what computes, and the source of `ScaledCrop`. Data
alone are kept, and an entry that cannot be read is found out anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_vlm.kernels.cache_folder import cache_folder
from dist_vlm.workers.models.llava.scaled_crop import ScaledCrop

_LIBRARIES = ("transformers", "pillow", "numpy")
_SOURCES = ("processor.py", "scaled_crop.py", "scaled_axis.py", "known_processors.py")


@dataclass(frozen=True, slots=True)
class KnownProcessor:
    """digest: of all settings, transformers' defaults among them."""

    digest: str
    scaled_crop: ScaledCrop


def find(class_name: str, settings: Mapping[str, Any]) -> KnownProcessor | None:
    """What is known of the image processor of this class with a checkpoint's settings."""
    path = _path(class_name, settings)
    if path is None or not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        digest, crop = found["digest"], found["scaled_crop"]
        levels = np.array(crop.pop("levels"), dtype=np.float32)
        known = KnownProcessor(digest, ScaledCrop(**crop, levels=levels))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    is_whole = isinstance(digest, str) and levels.shape == (3, 256) and all(type(one) is int for one in crop.values())
    return known if is_whole else None


def keep(class_name: str, settings: Mapping[str, Any], known: KnownProcessor) -> None:
    """Keeps it for later processes, where the cache can be written to."""
    path = _path(class_name, settings)
    if path is None:
        return
    crop = dataclasses.asdict(known.scaled_crop) | {"levels": known.scaled_crop.levels.tolist()}
    unfinished = path.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        unfinished.write_text(json.dumps({"digest": known.digest, "scaled_crop": crop}), encoding="utf-8")
        os.replace(unfinished, path)


def _path(class_name: str, settings: Mapping[str, Any]) -> Path | None:
    folder = cache_folder("image-processors")
    if folder is None:
        return None
    digest = hashlib.blake2b(digest_size=12)
    try:
        versions = [importlib.metadata.version(name) for name in _LIBRARIES]
    except importlib.metadata.PackageNotFoundError:  # one of another name stands in for it
        return None
    digest.update(json.dumps([class_name, settings, versions], sort_keys=True, default=str).encode())
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return folder / f"{digest.hexdigest()}.json"
