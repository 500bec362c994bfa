"""What one configuration field may hold: its type, range, help, and how text from a command line is read.

A `Rule` rides in the metadata of every configuration field. The dataclasses check with it, the YAML reader and the
command line report with it, and the flags are generated from it, so all three say the same.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dist_vlm.config_kinds import KINDS, Kind, NotOfKindError

_UNSET = object()


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

    `kind` is a name of `dist_vlm.config_kinds.KINDS`. `aliases` maps other spellings to the value kept.
    """

    kind: str
    help: str
    optional: bool = False
    choices: tuple[Any, ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    low: float | None = None
    high: float | None = None
    above: float | None = None
    short_flag: str = ""

    def check(self, value: Any) -> Any:
        """The value in its kept form (a float for a whole number, a tuple for a shape).

        Raises ValueError saying what is allowed.
        """
        if value is None and self.optional:
            return None
        try:
            value = self.of_kind.check(value)
        except NotOfKindError as error:
            raise ValueError(", ".join(part for part in (self.allowed(), str(error)) if part)) from None
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
            value = self.of_kind.parse(text)
        except ValueError:
            raise ValueError(self.allowed()) from None
        return self.check(value)

    def allowed(self) -> str:
        if self.choices:
            text = "must be one of " + ", ".join(str(choice) for choice in self.choices)
        else:
            text = f"must be {self.of_kind.allowed}{self._bounds()}"
        return f"{text}, or none" if self.optional else text

    def error(self, problem: str, *, field: str, value: object, source: str = "") -> ConfigError:
        """A `ConfigError` about a value of this field; a secret one is not in it."""
        shown = _UNSET if self.of_kind.is_secret else value
        return ConfigError(problem, field=field, value=shown, source=source)

    @property
    def of_kind(self) -> Kind:
        return KINDS[self.kind]

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


def option(kind: str, default: Any = dataclasses.MISSING, **rule: Any) -> Any:
    """A dataclass field with its `Rule`. A default of None makes the field optional; no default makes it required."""
    made = Rule(kind=kind, optional=default is None, **rule)
    return dataclasses.field(default=default, metadata={"rule": made}, repr=not made.of_kind.is_secret)


def rules_of(section: type) -> dict[str, Rule]:
    return {f.name: f.metadata["rule"] for f in dataclasses.fields(section)}


def check_section(section: Any, name: str) -> None:
    """Check every field of a frozen section and keep its canonical form; raises ConfigError naming `name.field`."""
    for field_name, rule in rules_of(type(section)).items():
        value = getattr(section, field_name)
        try:
            object.__setattr__(section, field_name, rule.check(value))
        except ValueError as error:
            raise rule.error(str(error), field=f"{name}.{field_name}", value=value) from None


def nearest_name(name: object, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return close[0] if close else None


def nearest(name: object, known: Iterable[str]) -> str:
    """The words "; the nearest is X" for the known name closest to `name`, or "" where none is close."""
    close = nearest_name(name, known)
    return f"; the nearest is {close}" if close else ""
