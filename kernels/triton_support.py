"""Whether the Triton kernels can run. Imports neither triton nor torch: the driver asks before any rank starts."""

from __future__ import annotations

import importlib.util
import os

_TRUE = ("1", "true", "yes", "on", "y")


def triton_found() -> bool:
    """Whether triton can be imported here."""
    return importlib.util.find_spec("triton") is not None


def triton_interpreted() -> bool:
    """Whether TRITON_INTERPRET is set, with which triton runs kernels on a CPU, slowly, to test them.

    It has to be set before triton and the kernels' modules are imported.
    """
    return os.environ.get("TRITON_INTERPRET", "").strip().lower() in _TRUE
