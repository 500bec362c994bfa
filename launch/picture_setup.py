"""What tasks on other machines have to know to prepare pictures."""

from __future__ import annotations

from dataclasses import dataclass

from dist_vlm.config import EngineConfig
from dist_vlm.config_server import ServerConfig
from dist_vlm.launch.remote_media import FLAGS


@dataclass(frozen=True, slots=True)
class PictureSetup:
    """config, server: resolved; of the latter only what `RemoteMedia` reads is kept: it goes to other machines, where
    a server's key has no place. media_root: where names of files start."""

    config: EngineConfig
    server: ServerConfig
    media_root: str

    def __post_init__(self) -> None:
        kept = {name: getattr(self.server, name) for name in (*FLAGS, "disable_media_fetch")}
        object.__setattr__(self, "server", ServerConfig(**kept))
