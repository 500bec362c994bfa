"""The `dist-vlm` command: parses the line, runs one subcommand, and turns every user's mistake into one line.

Exit status: 0 done, 1 a run failed, 2 a wrong command line or configuration, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from typing import NoReturn

from dist_vlm.config import ConfigError
from dist_vlm.config_fields import nearest
from dist_vlm.launch import check, config_show, generate, info
from dist_vlm.version import __version__

COMMANDS = (generate, check, info, config_show)

_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130


class UsageError(Exception):
    """A command line that cannot be understood."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def flags(self) -> set[str]:
        """The long flags of this parser and of every subcommand."""
        found = {flag for action in self._actions for flag in action.option_strings if flag.startswith("--")}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for child in action.choices.values():
                    found |= child.flags()
        return found


def build_parser() -> _Parser:
    """The whole command line. Each module of `COMMANDS` adds its own part and sets `run`."""
    parser = _Parser(prog="dist-vlm", description="Serve vision-language models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dist-vlm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for module in COMMANDS:
        module.add_command(commands)
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = build_parser()
    known = parser.flags()
    try:
        arguments, extra = parser.parse_known_args(argv)
    except UsageError as error:
        # A misspelt flag leaves another one missing: tell of the cause.
        misspelt = [word.partition("=")[0] for word in argv if word.startswith("--") and word != "--"]
        unknown = [name for name in misspelt if name not in known]
        raise _unknown("flag", unknown[0], known) if unknown else error from None
    if extra:
        kind = "flag" if extra[0].startswith("-") else "argument"
        raise _unknown(kind, extra[0].partition("=")[0], known if kind == "flag" else ())
    return arguments


def _unknown(kind: str, name: str, known: Collection[str]) -> UsageError:
    return UsageError(f"unknown {kind} {name}{nearest(name, known)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line (default: this process's own) and returns the exit status."""
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        run: Callable[[argparse.Namespace], None] = arguments.run
        run(arguments)
    except (UsageError, ConfigError) as error:
        return _say(error, _USAGE)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left: nobody to tell, and no complaint at exit
        return _FAILED
    except (ValueError, RuntimeError, OSError) as error:
        return _say(error, _FAILED)
    except KeyboardInterrupt:
        return _say("interrupted", _INTERRUPTED)
    return 0


def _say(error: Exception | str, status: int) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"dist-vlm: error: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
