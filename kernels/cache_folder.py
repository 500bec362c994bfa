"""Where this package keeps on disk what takes long to make: a folder of the user's alone."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path | None:
    """`dist-vlm/<name>` in the user's cache, made where it is missing; None where it cannot be written to."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "dist-vlm" / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a user without a home directory
        return None
    return folder if os.access(folder, os.W_OK) else None
