"""The `dist-vlm` command: parses the line and runs one subcommand. `dist_vlm.command_line` has the exit statuses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from dist_vlm.command_line import Parser, run_command
from dist_vlm.launch import bench, check, config_show, generate, info, restart, serve, submit, tune_collectives
from dist_vlm.version import __version__

COMMANDS = (serve, restart, submit, generate, check, bench, tune_collectives, info, config_show)


def build_parser() -> Parser:
    """The whole command line. Each module of `COMMANDS` adds its own part and sets `run`."""
    parser = Parser(prog="dist-vlm", description="Serve vision-language models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dist-vlm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for module in COMMANDS:
        module.add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line (default: this process's own) and returns the exit status."""

    def run() -> int | None:
        words, inner = _split(list(sys.argv[1:] if argv is None else argv))
        arguments = build_parser().parse(words)
        if inner:
            arguments.inner = inner
        subcommand: Callable[[Any], int | None] = arguments.run
        return subcommand(arguments)

    return run_command(run)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """The words of `submit`, and behind a -- those of the command that it submits."""
    if words[:1] != ["submit"] or "--" not in words:
        return words, []
    place = words.index("--")
    return words[:place], words[place + 1 :]


if __name__ == "__main__":
    sys.exit(main())
