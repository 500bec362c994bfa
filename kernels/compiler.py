"""Where the C++ compiler of the CPU kernels is. Imports no torch: the driver asks before any rank starts."""

from __future__ import annotations

import shutil

COMPILERS = ("g++", "c++")


def find_compiler() -> str | None:
    """Path of the compiler, or None where there is none."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)
