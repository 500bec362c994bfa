"""`dist-vlm config show`: a configuration as the engine would use it."""

from __future__ import annotations

import argparse
from typing import Any

from dist_vlm.config_load import LoadedConfig, add_config_flags, config_flags, dump_yaml, load_config


def add_command(commands: Any) -> None:
    config = commands.add_parser("config", help="look at configurations", allow_abbrev=False)
    verbs = config.add_subparsers(metavar="VERB", required=True, dest="verb")
    show = verbs.add_parser("show", help="print a configuration with every auto decided", allow_abbrev=False)
    show.add_argument("file", metavar="FILE", help="YAML file")
    show.add_argument("--sources", action="store_true", help="say beside each value where it comes from")
    show.add_argument(
        "--no-checkpoint", action="store_true", help="do not read the checkpoint; what it decides stays open"
    )
    add_config_flags(show)
    show.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    loaded = load_config(arguments.file, config_flags(arguments))
    print(shown(loaded, sources=arguments.sources, checkpoint=not arguments.no_checkpoint), end="")


def shown(loaded: LoadedConfig, *, sources: bool, checkpoint: bool) -> str:
    """The resolved configuration as YAML, each value with its source where `sources` is set."""
    resolved = loaded.resolve(checkpoint=checkpoint)
    if not sources:
        return dump_yaml(resolved)
    before, after = loaded.config.fields(), resolved.fields()
    found = {name: "default" if before[name] == after[name] else "resolved" for name in after}
    for name, source in loaded.sources.items():
        found[name] = source if before[name] == after[name] else f"{source}, resolved"
    return dump_yaml(resolved, found)
