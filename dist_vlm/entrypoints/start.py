"""From a configuration, as a command has read it, to a running server."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from dist_vlm.config import ConfigError, EngineConfig
from dist_vlm.config_load import LoadedConfig
from dist_vlm.config_server import ServerConfig
from dist_vlm.engine.template_source import given_template
from dist_vlm.machine import usable_cores

if TYPE_CHECKING:
    from dist_vlm.engine.core_client import CoreClient

PACKAGES = ("fastapi", "uvicorn", "httptools", "uvloop", "aiohttp", "prometheus_client")
_FILES = ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs")


def start_server(loaded: LoadedConfig, make_client: Callable[[EngineConfig], CoreClient] | None = None) -> int:
    """Serves until it is told to end; returns the exit status.

    make_client: makes the engine, not started, of the resolved configuration, in place of one beside the server.

    Raises `ConfigError` naming the file, flag or variable of what cannot be served, and `RuntimeError` where the
    server's packages are missing, both before anything is started.
    """
    engine, server = _beside_a_server(loaded), loaded.resolve_server(os.environ)
    try:
        _check_servable(engine, server)
    except ConfigError as error:
        raise loaded.located(error) from None
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise RuntimeError(f"the server's packages are missing ({names}): pip install 'dist-vlm[server]'")
    serve = importlib.import_module("dist_vlm.server.serve").serve
    return int(serve(engine, server, None if make_client is None else make_client(engine)))


def _beside_a_server(loaded: LoadedConfig) -> EngineConfig:
    """The engine's configuration, resolved. On a CPU the ranks leave a core to the server, unless the threads are
    given: with a thread on every core each step waits for the one that the server has just taken."""
    engine = loaded.resolve()
    if engine.parallel.device != "cpu" or "threads_per_rank" in loaded.sources:
        return engine
    num_ranks = engine.parallel.tensor_parallel_size * -(-engine.parallel.replicas // engine.parallel.num_nodes)
    return engine.replace(threads_per_rank=max(1, (usable_cores() - 1) // num_ranks))


def _check_servable(engine: EngineConfig, server: ServerConfig) -> None:
    kind = engine.vision.image_input_type
    if kind not in (None, "pixel_values"):
        problem = "a server takes pictures, not what a vision tower made of them: must be pixel_values or left out"
        raise ConfigError(problem, field="vision.image_input_type", value=kind)
    if server.chat_template is not None:
        given_template(server.chat_template, field="server.chat_template")
    for name in _FILES:
        path = getattr(server, name)
        if path is not None and not os.path.isfile(path):
            raise ConfigError("must be an existing file", field=f"server.{name}", value=path)
