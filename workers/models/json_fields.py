"""Checked reading of the fields of a checkpoint's JSON files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_vlm.workers.models.spec import CheckpointError


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `CheckpointError` where it is missing or something else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except ValueError:
        raise CheckpointError(f"{file} is not JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return value


class Fields:
    """The fields of one object in a JSON file. An absent or null field takes its default.

    Every method raises `CheckpointError` naming file, field, value and what is allowed.
    """

    def __init__(self, file: Path, values: dict[str, Any], section: str = "") -> None:
        self.file = file
        self.values = values
        self._prefix = f"{section}." if section else ""

    def error(self, name: str, allowed: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {self._prefix}{name} is {self.values.get(name)!r}, must be {allowed}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.error(name, f"an integer of at least {minimum}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise self.error(name, "a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def choice(self, name: str, default: str, allowed: Sequence[str]) -> str:
        value = self._get(name, default)
        if value not in allowed:
            raise self.error(name, " or ".join(allowed))
        return str(value)

    def text(self, name: str, default: str) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.error(name, "a string")
        return value

    def section(self, name: str) -> Fields:
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, "an object")
        return Fields(self.file, value, f"{self._prefix}{name}")

    def integers(self, name: str) -> tuple[int, ...] | None:
        """An integer or a list of them; None where the field is absent."""
        value = self.values.get(name)
        if value is None:
            return None
        items = value if isinstance(value, list) else [value]
        if not items or any(not isinstance(item, int) or isinstance(item, bool) for item in items):
            raise self.error(name, "an integer or a list of integers")
        return tuple(items)
