"""What every command of this project does alike: strict parsing, and each user's mistake as one line on stderr.

Exit status: 0 done, 1 a run failed, 2 a wrong command line or configuration, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from typing import NoReturn

from dist_vlm.config_fields import ConfigError, nearest

_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130


class UsageError(Exception):
    """A command line that cannot be understood."""


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` in place of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def flags(self, argv: Sequence[str] = ()) -> set[str]:
        """The long flags of this parser and of the subcommand that `argv` names; of all where it names none."""
        found = {flag for action in self._actions for flag in action.option_strings if flag.startswith("--")}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                named = next((action.choices[word] for word in argv if word in action.choices), None)
                for child in [named] if named is not None else action.choices.values():
                    found |= child.flags(argv)
        return found

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Raises `UsageError`; for a flag that does not exist, with the nearest one."""
        known = self.flags(argv)
        try:
            arguments, extra = self.parse_known_args(argv)
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


def run_command(run: Callable[[], int | None]) -> int:
    """Calls `run` and returns the exit status: what it returned (none is 0), or that of the mistake it raised."""
    try:
        return run() or 0
    except (UsageError, ConfigError) as error:
        return _say(error, _USAGE)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left: nobody to tell, and no complaint at exit
        return _FAILED
    except (ValueError, RuntimeError, OSError) as error:
        return _say(error, _FAILED)
    except KeyboardInterrupt:
        return _say("interrupted", _INTERRUPTED)


def _say(error: Exception | str, status: int) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"dist-vlm: error: {text}", file=sys.stderr)
    return status
