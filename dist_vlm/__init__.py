"""Serve vision-language models from tensor-parallel ranks placed by Ray.

The public names load on first use, so that `import dist_vlm` (and with it the command line) costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from dist_vlm.version import __version__

if TYPE_CHECKING:
    from dist_vlm.config import ConfigError, EngineConfig

_HOMES = {
    "ConfigError": "dist_vlm.config",
    "EngineConfig": "dist_vlm.config",
}

__all__ = ["ConfigError", "EngineConfig", "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'dist_vlm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
