"""`dist-vlm config show`: a configuration as the engine and the server would use it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from dist_vlm.config_environment import sources_of
from dist_vlm.config_load import SERVER_RULES, LoadedConfig, add_config_flags, config_flags, dump_yaml, load_config


def add_command(commands: Any) -> None:
    config = commands.add_parser("config", help="look at configurations", allow_abbrev=False)
    verbs = config.add_subparsers(metavar="VERB", required=True, dest="verb")
    show = verbs.add_parser("show", help="print a configuration with every auto decided", allow_abbrev=False)
    show.add_argument("file", metavar="FILE", help="YAML file")
    show.add_argument("--sources", action="store_true", help="say beside each value where it comes from")
    show.add_argument("--server", action="store_true", help="print the server's section even if the file has none")
    show.add_argument(
        "--no-checkpoint", action="store_true", help="do not read the checkpoint; what it decides stays open"
    )
    add_config_flags(show)
    show.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    loaded = load_config(arguments.file, config_flags(arguments))
    text = shown(
        loaded,
        sources=arguments.sources,
        checkpoint=not arguments.no_checkpoint,
        server=arguments.server or loaded.has_server,
        environ=os.environ,
    )
    print(text, end="")


def shown(
    loaded: LoadedConfig, *, sources: bool, checkpoint: bool, server: bool = False, environ: Mapping[str, str]
) -> str:
    """The resolved configuration as YAML, each value with its source where `sources` is set; with the server's section
    where `server` is. What the environment says is in that section, but no key."""
    engine = loaded.resolve(checkpoint=checkpoint)
    section = loaded.resolve_server(environ) if server else None
    if not sources:
        return dump_yaml(engine, server=section)
    before, after = loaded.config.fields(), engine.fields()
    if section is not None:
        before |= {name: getattr(loaded.server, name) for name in SERVER_RULES}
        after |= {name: getattr(section, name) for name in SERVER_RULES}
    found = {name: "default" if before[name] == after[name] else "resolved" for name in after}
    if section is not None:
        found |= sources_of(loaded.server, environ)
    for name, source in loaded.sources.items():
        if name in after:
            found[name] = source if before[name] == after[name] else f"{source}, resolved"
    return dump_yaml(engine, found, server=section)
