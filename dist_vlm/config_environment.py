"""What the environment says about the server, and the server's section with it.

Each variable is read under this project's name and, where that is not set, under the name it has in vLLM.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from dist_vlm.config import EngineConfig
from dist_vlm.config_fields import ConfigError, rules_of
from dist_vlm.config_server import ServerConfig
from dist_vlm.machine import usable_cores

API_KEY = ("DIST_VLM_API_KEY", "VLLM_API_KEY")
IMAGE_FETCH_TIMEOUT = ("DIST_VLM_IMAGE_FETCH_TIMEOUT", "VLLM_IMAGE_FETCH_TIMEOUT")

_DEFAULT_FETCH_TIMEOUT_S = 5.0
_MAX_MEDIA_WORKERS = 8


def api_key(environ: Mapping[str, str]) -> str | None:
    """The key that clients must send; None where no variable is set.

    Raises `ConfigError` naming the variable, without its value, for one that no client could send: an empty one too,
    since whoever set it meant the server to be closed.
    """
    name = variable(environ, API_KEY)
    if name is None:
        return None
    rule = rules_of(ServerConfig)["api_key"]
    try:
        return str(rule.of_kind.check(environ[name]))
    except ValueError:
        problem = f"must be {rule.of_kind.allowed}, or not set at all"
        raise rule.error(problem, field=name, value=environ[name]) from None


def image_fetch_timeout_s(environ: Mapping[str, str]) -> float:
    """Seconds to fetch one picture. Raises `ConfigError` naming the variable and its value."""
    name = variable(environ, IMAGE_FETCH_TIMEOUT)
    if name is None:
        return _DEFAULT_FETCH_TIMEOUT_S
    try:
        seconds = float(environ[name])
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError("must be a number of seconds, above 0, finite", field=name, value=environ[name])
    return seconds


def variable(environ: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    """The first of the names that is set."""
    return next((name for name in names if name in environ), None)


def resolved_server(server: ServerConfig, engine: EngineConfig, environ: Mapping[str, str]) -> ServerConfig:
    """The section with everything decided; what it says itself comes before the environment.

    engine: as it was given, not resolved: clients know the model by that path. A chat template stays a file or a text.
    """
    return dataclasses.replace(
        server,
        api_key=server.api_key or api_key(environ),
        image_fetch_timeout_s=server.image_fetch_timeout_s or image_fetch_timeout_s(environ),
        served_model_name=server.served_model_name or engine.model.model,
        media_workers=server.media_workers or max(1, min(_MAX_MEDIA_WORKERS, usable_cores() // 2)),
    )


def sources_of(server: ServerConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """Field name to the variable that decides it, of those that the section leaves open."""
    variables = {"api_key": API_KEY, "image_fetch_timeout_s": IMAGE_FETCH_TIMEOUT}
    found = {field: variable(environ, names) for field, names in variables.items() if getattr(server, field) is None}
    return {field: name for field, name in found.items() if name is not None}
