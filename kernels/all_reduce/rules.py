"""Which way a collective goes, by the bytes of a rank's part and the number of ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPS = ("reduce_add_norm", "all_reduce", "all_gather")
# group: the process group's own collective, NCCL or gloo, with the norm in a kernel of its own.
PATHS = ("one_shot", "two_shot", "group")
_TABLES = Path(__file__).parent / "tables"


class RulesError(ValueError):
    """A table is not one of rules; the message names the field, the value and what is allowed."""


@dataclass(frozen=True, slots=True)
class Rule:
    """up_to_bytes: None for any number. fused: whether residual and norm are part of the collective's kernel; where
    they are not, a reduce_add_norm leaves the way of its sum to the rules of all_reduce."""

    up_to_bytes: int | None
    path: str
    fused: bool = False

    def __str__(self) -> str:
        size = "more" if self.up_to_bytes is None else f"to {self.up_to_bytes} bytes"
        return f"{size} {self.path}{' fused' if self.fused else ''}"


@dataclass(frozen=True, slots=True)
class Rules:
    """For one number of ranks. by_op: rules in the order of their sizes, the last for any size.

    source: where they come from, for the log.
    """

    by_op: Mapping[str, tuple[Rule, ...]]
    source: str

    def choose(self, op: str, num_bytes: int) -> Rule:
        for rule in self.by_op[op]:
            if rule.up_to_bytes is None or num_bytes <= rule.up_to_bytes:
                return rule
        raise AssertionError("the last rule is for any size")

    def without_group(self) -> Rules:
        """The same where the process group's collectives cannot be had: great sizes go in two shots, gathers in one."""
        return Rules({op: _without_group(op, rules) for op, rules in self.by_op.items()}, self.source)

    def edges(self, op: str) -> list[int]:
        """The sizes at which the way changes."""
        return [rule.up_to_bytes for rule in self.by_op[op] if rule.up_to_bytes is not None]

    def __str__(self) -> str:
        return "; ".join(f"{op}: {', '.join(map(str, rules))}" for op, rules in self.by_op.items())


def _without_group(op: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    kept = [rule for rule in rules if rule.path != "group"]
    last = Rule(None, "one_shot" if op == "all_gather" else "two_shot", op == "reduce_add_norm")
    return tuple(rule for rule in kept if rule.up_to_bytes is not None) + (last,)


def rules_for(device_name: str, world_size: int, *, table: str | None = None) -> Rules:
    """The rules of a measured table, or where this device and number of ranks was never measured, `estimated_rules`.

    table: JSON in place of the tables that come with the package; it must have this number of ranks.
    Raises `RulesError`.
    """
    if table is not None:
        return parse_table(table, world_size, "the configured table")
    path = _TABLES / f"{device_name.lower().replace(' ', '-')}.json"
    if path.exists():
        text = path.read_text(encoding="utf-8")
        if str(world_size) in json.loads(text)["ranks"]:
            return parse_table(text, world_size, path.name)
    return estimated_rules(world_size)


def estimated_rules(world_size: int) -> Rules:
    """Not measured here: one shot while what it sends to each other rank costs less than a second way over the link,
    about 2 microseconds on NVLink at 400 GB/s; two shots until the process group's rings and copies are no slower."""
    one_shot = (1 << 20) // (world_size - 1)
    one, two, rest = Rule(one_shot, "one_shot"), Rule(8 << 20, "two_shot"), Rule(None, "group")
    return Rules(
        {
            "reduce_add_norm": (
                Rule(one.up_to_bytes, "one_shot", fused=True),
                Rule(two.up_to_bytes, "two_shot", fused=True),
                rest,
            ),
            "all_reduce": (one, two, rest),
            "all_gather": (Rule(1 << 20, "one_shot"), rest),
        },
        f"an estimate: {world_size} ranks were not measured on this device",
    )


def parse_table(text: str, world_size: int, source: str) -> Rules:
    """Rules for `world_size` ranks from a table as `dist-vlm tune-collectives` writes it. Raises `RulesError`."""
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise RulesError(f"{source}: not JSON: {error}") from None
    place = f"ranks.{world_size}"
    rules = _member(source, _member(source, table, "ranks", "ranks"), str(world_size), place)
    by_op = {op: _parse_rules(f"{source}: {place}.{op}", op, _member(source, rules, op, f"{place}.{op}")) for op in OPS}
    return Rules(by_op, source)


def _member(source: str, value: Any, name: str, place: str) -> Any:
    if not isinstance(value, dict) or name not in value:
        found = ", ".join(value) if isinstance(value, dict) else repr(value)
        raise RulesError(f"{source}: {place} is missing; there is: {found}")
    return value[name]


def _parse_rules(place: str, op: str, found: Any) -> tuple[Rule, ...]:
    if not isinstance(found, list) or not found:
        raise RulesError(f"{place} is {found!r}, must be a list of rules")
    rules = tuple(_parse_rule(place, op, entry) for entry in found)
    sizes = [rule.up_to_bytes for rule in rules]
    if sizes[-1] is not None:
        raise RulesError(f"{place}: the last rule has up_to_bytes {sizes[-1]}, must be null: for any size")
    known = [size for size in sizes[:-1] if size is not None]
    if len(known) != len(sizes) - 1 or known != sorted(set(known)):
        raise RulesError(f"{place}: up_to_bytes are {sizes}, must grow from rule to rule")
    return rules


def _parse_rule(place: str, op: str, entry: Any) -> Rule:
    if not isinstance(entry, dict) or set(entry) - {"up_to_bytes", "path", "fused"}:
        raise RulesError(f"{place}: {entry!r}, must have up_to_bytes, path and fused alone")
    size, path, fused = entry.get("up_to_bytes"), entry.get("path"), entry.get("fused", False)
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise RulesError(f"{place}: up_to_bytes is {size!r}, must be a positive number or null")
    allowed = ("one_shot", "group") if op == "all_gather" else PATHS
    if path not in allowed:
        raise RulesError(f"{place}: path is {path!r}, must be one of {', '.join(allowed)}")
    if not isinstance(fused, bool) or (fused and (op != "reduce_add_norm" or path == "group")):
        raise RulesError(f"{place}: fused is {fused!r}, must be false there")
    return Rule(size, str(path), fused)


def table_entry(rules: Sequence[Rule]) -> list[dict[str, Any]]:
    """As a table has them."""
    return [{"up_to_bytes": rule.up_to_bytes, "path": rule.path, "fused": rule.fused} for rule in rules]
