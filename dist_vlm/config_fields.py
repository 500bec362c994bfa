"""What one configuration field may hold: its type, range, help, and how text from a command line is read.

A `Rule` rides in the metadata of every configuration field. The dataclasses check with it, the YAML reader and the
command line report with it, and the flags are generated from it, so all three say the same.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_UNSET = object()
_KINDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "shape": "four integers, such as 1,3,336,336",
}


class ConfigError(ValueError):
    """A configuration that cannot be used. The text names where it stands, the key, the value and what is allowed.

    `field` is the dotted name ("parallel.tensor_parallel_size") or "" for an error of a whole file; `source` is a file,
    a flag or a call. A flag replaces the dotted name in the text, any other source stands before it.
    """

    def __init__(self, problem: str, *, field: str = "", value: object = _UNSET, source: str = "") -> None:
        self.problem, self.field, self.value, self.source = problem, field, value, source
        label = source if source.startswith("-") else ": ".join(part for part in (source, field) if part)
        if value is not _UNSET:
            label += f" = {_shown(value)}"
        super().__init__(f"{label}: {problem}" if label else problem)

    def __reduce__(self) -> tuple[Any, ...]:
        given = None if self.value is _UNSET else repr(self.value)
        return _rebuild, (self.args[0], self.problem, self.field, given, self.source)

    def at(self, source: str) -> ConfigError:
        """The same error, said to come from `source`; an error that already has a source keeps it."""
        if self.source or not source:
            return self
        return ConfigError(self.problem, field=self.field, value=self.value, source=source)


def _rebuild(text: str, problem: str, field: str, value: str | None, source: str) -> ConfigError:
    error = ConfigError(problem, field=field, source=source)
    error.args, error.value = (text,), _UNSET if value is None else value
    return error


def _shown(value: object, most: int = 80) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= most else text[: most - 3] + "..."


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The values a field takes. Bounds are inclusive; `above` is an exclusive lower bound.

    `aliases` maps other spellings to the value kept. `is_path` marks a directory: from YAML, a leading "./" or "../" is
    relative to the file.
    """

    kind: str
    help: str
    optional: bool = False
    choices: tuple[Any, ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    low: float | None = None
    high: float | None = None
    above: float | None = None
    is_path: bool = False
    short_flag: str = ""

    def check(self, value: Any) -> Any:
        """The value in its kept form (a float for a whole number, a tuple for a shape).

        Raises ValueError saying what is allowed.
        """
        if value is None and self.optional:
            return None
        value = self._typed(value)
        if isinstance(value, str):
            value = self.aliases.get(value, value)
        if self.choices and value not in self.choices:
            raise ValueError(self.allowed() + nearest(value, [str(choice) for choice in self.choices]))
        if isinstance(value, int | float) and not self._inside(value):
            raise ValueError(self.allowed())
        return value

    def parse(self, text: str) -> Any:
        """A command line's text as a checked value; "none" stands for an absent one where that is allowed."""
        if self.optional and text.lower() == "none":
            return None
        try:
            value = _PARSERS.get(self.kind, str)(text)
        except ValueError:
            raise ValueError(self.allowed()) from None
        return self.check(value)

    def allowed(self) -> str:
        if self.choices:
            text = "must be one of " + ", ".join(str(choice) for choice in self.choices)
        else:
            text = f"must be {_KINDS[self.kind]}{self._bounds()}"
        return f"{text}, or none" if self.optional else text

    def _typed(self, value: Any) -> Any:
        if self.kind == "shape":
            return self._shape(value)
        if self.is_path and isinstance(value, os.PathLike):
            value = os.fspath(value)
        kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
        fits = isinstance(value, kinds[self.kind]) and (self.kind == "bool" or not isinstance(value, bool))
        if not fits:
            raise ValueError(self.allowed())
        if self.kind == "str" and (not value.strip() or "\0" in value):
            raise ValueError(f"{self.allowed()}, not empty and without NUL")
        return _finite_float(value, self.allowed()) if self.kind == "float" else value

    def _shape(self, value: Any) -> tuple[int, ...]:
        if isinstance(value, str):
            try:
                value = [int(part) for part in value.split(",")]
            except ValueError:
                raise ValueError(self.allowed()) from None
        whole = isinstance(value, list | tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
        if not whole or len(value) != 4 or min(value) < 1:
            raise ValueError(f"{self.allowed()}, each at least 1")
        return tuple(value)

    def _inside(self, value: float) -> bool:
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
        )

    def _bounds(self) -> str:
        parts = []
        if self.above is not None:
            parts.append(f"above {self.above:,}".replace(",", "_"))
        if self.low is not None:
            parts.append(f"at least {self.low:,}".replace(",", "_"))
        if self.high is not None:
            parts.append(f"at most {self.high:,}".replace(",", "_"))
        return "".join(f", {part}" for part in parts)


def _finite_float(value: float, allowed: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{allowed}, finite")
    return number


def _parse_bool(text: str) -> bool:
    lowered = text.lower()
    if lowered not in ("true", "false"):
        raise ValueError(text)
    return lowered == "true"


_PARSERS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "bool": _parse_bool}


def option(kind: str, default: Any = dataclasses.MISSING, **rule: Any) -> Any:
    """A dataclass field with its `Rule`. A default of None makes the field optional; no default makes it required."""
    return dataclasses.field(default=default, metadata={"rule": Rule(kind=kind, optional=default is None, **rule)})


def rules_of(section: type) -> dict[str, Rule]:
    return {f.name: f.metadata["rule"] for f in dataclasses.fields(section)}


def check_section(section: Any, name: str) -> None:
    """Check every field of a frozen section and keep its canonical form; raises ConfigError naming `name.field`."""
    for field_name, rule in rules_of(type(section)).items():
        value = getattr(section, field_name)
        try:
            object.__setattr__(section, field_name, rule.check(value))
        except ValueError as error:
            raise ConfigError(str(error), field=f"{name}.{field_name}", value=value) from None


def nearest_name(name: object, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return close[0] if close else None


def nearest(name: object, known: Iterable[str]) -> str:
    """The words "; the nearest is X" for the known name closest to `name`, or "" where none is close."""
    close = nearest_name(name, known)
    return f"; the nearest is {close}" if close else ""
