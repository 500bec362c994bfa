"""What tasks on other machines have to know to prepare pictures."""

from __future__ import annotations

from dataclasses import dataclass

from dist_vlm.config import EngineConfig
from dist_vlm.config_server import ServerConfig


@dataclass(frozen=True, slots=True)
class PictureSetup:
    """config, server: resolved. media_root: where names of files start."""

    config: EngineConfig
    server: ServerConfig
    media_root: str
