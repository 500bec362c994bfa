"""`dist-vlm serve`: the OpenAI-compatible HTTP server."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from dist_vlm.config import RULES, EngineConfig
from dist_vlm.config_load import SERVER_RULES, add_config_flags, config_flags, load_config
from dist_vlm.entrypoints.start import start_server

if TYPE_CHECKING:
    from dist_vlm.engine.core_client import CoreClient

_TEXT = """\
Serves a model over HTTP in OpenAI's form: /v1/chat/completions, /v1/completions, /v1/models and others; a page to try
it is at /. Without a file, --model is enough.

It listens on 127.0.0.1 only, unless --host says otherwise; then give an --api-key too (or set DIST_VLM_API_KEY, which
no list of processes shows). Pictures are fetched from public addresses alone, unless --allowed-media-networks says
otherwise. A SIGTERM ends it once the requests in work have ended.

With --replicas above 1, or --max-replicas, several tensor-parallel groups stand behind the one address, kept by Ray
Serve on this machine or in the cluster at --ray-address: a request goes to the one that holds the beginning of its
prompt, and on to another if that one is lost. In a cluster `dist-vlm restart` replaces them one after the other."""


def add_command(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description=_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    serve.add_argument("--config", metavar="FILE", help="YAML file; without it --model is needed")
    add_config_flags(serve, (*RULES, *SERVER_RULES))
    serve.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    loaded = load_config(arguments.config, config_flags(arguments))
    return start_server(loaded, _replicas if loaded.config.most_replicas > 1 else None)


def _replicas(config: EngineConfig) -> CoreClient:
    """Raises `RuntimeError` where Ray Serve is missing."""
    if importlib.util.find_spec("ray.serve") is None or importlib.util.find_spec("watchfiles") is None:
        raise RuntimeError("several replicas need Ray Serve, which is missing: pip install 'dist-vlm[cluster]'")
    client: CoreClient = importlib.import_module("dist_vlm.launch.replica_client").ReplicaClient(config)
    return client
