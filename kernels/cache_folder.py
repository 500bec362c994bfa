"""Where this package keeps on disk what takes long to make: a folder of the user's alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def cache_folder(name: str) -> Path | None:
    """`dist-vlm/<name>` in the user's cache, made where it is missing; None where it cannot be written to, or where
    others can write to it: what lies in it is loaded as code, or trusted like it."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        folders = [base / "dist-vlm", base / "dist-vlm" / name]
        for folder in folders:
            folder.mkdir(mode=0o700, exist_ok=True)
        is_own = all(map(_is_own, folders))
    except (OSError, RuntimeError):  # a user without a home directory
        return None
    return folder if is_own and os.access(folder, os.W_OK) else None


def _is_own(folder: Path) -> bool:
    found = folder.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
