"""What a device does in a step that it repeats, out of the names and times of all that ran on it."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

Event = tuple[str, float, float]
"""Name, beginning and end, in microseconds."""


@dataclass(frozen=True, slots=True)
class Row:
    """All of one name, in a step. share: of the step's time. idle_before_us: when nothing ran, until one of these."""

    name: str
    count: float
    total_us: float
    share: float
    idle_before_us: float


@dataclass(frozen=True, slots=True)
class Table:
    """Means over `steps` steps, each from the beginning of its first event to that of the next step's.

    busy_us: in which at least one event ran, on whatever stream. idle_us: the rest. between_us: the part of it that
    is after the end of a step's last event. rows: the longest first; their times add up to more than `busy_us` where
    events overlap.
    """

    steps: int
    wall_us: float
    median_us: float
    longest_us: float
    busy_us: float
    idle_us: float
    between_us: float
    rows: tuple[Row, ...]

    @property
    def idle_share(self) -> float:
        return self.idle_us / self.wall_us

    @property
    def between_share(self) -> float:
        return self.between_us / self.wall_us

    def as_json(self) -> dict[str, Any]:
        fields = asdict(self) | {"idle_share": self.idle_share, "between_share": self.between_share}
        rows = [_rounded(row) for row in fields.pop("rows")]
        return _rounded(fields) | {"rows": rows}

    def text(self) -> str:
        width = max(len(row.name) for row in self.rows)
        head = f"{'':<{width}}  {'a step':>7}  {'us':>9}  {'share':>6}  {'idle before':>11}"
        lines = [
            f"{row.name:<{width}}  {row.count:7.1f}  {row.total_us:9.1f}  {100 * row.share:5.1f}%  "
            f"{row.idle_before_us:11.1f}"
            for row in self.rows
        ]
        idle = f"idle {self.idle_us:.1f} us ({100 * self.idle_share:.1f} %)"
        between = f"{self.between_us:.1f} us ({100 * self.between_share:.1f} %) of it between steps"
        sums = f"a step: {self.wall_us:.1f} us, median {self.median_us:.1f}; busy {self.busy_us:.1f}, {idle}, {between}"
        return "\n".join([head, *lines, sums])


def timeline(events: Iterable[Event], *, first: str, last: str, skip: int = 0) -> Table:
    """first, last: short names of the events with which a step begins and ends, once in each.
    skip: steps at the beginning that do not count. Raises `ValueError` where there is no whole step of such events.
    """
    ordered = sorted((short(name), start, end) for name, start, end in events)
    ordered.sort(key=lambda event: event[1:])
    starts = [start for name, start, _ in ordered if name == first][skip:]
    if len(starts) < 2 or not any(name == last for name, *_ in ordered):
        raise ValueError(f"no steps from {first!r} to {last!r} among {_told(ordered)}")
    begin, end = starts[0], starts[-1]
    inside = [event for event in ordered if event[2] > begin and event[1] < end]
    steps = len(starts) - 1
    counts: Counter[str] = Counter()
    totals: defaultdict[str, float] = defaultdict(float)
    idle: defaultdict[str, float] = defaultdict(float)
    # busy_until: the latest end so far. open_us: what was idle since the end of a step's last event.
    busy_until, between_us, open_us, is_open = begin, 0.0, 0.0, False
    for name, start, stop in [*inside, (first, end, end)]:
        gap = max(0.0, start - busy_until)
        idle[name] += gap
        open_us += gap
        if name == first:
            between_us += open_us if is_open else 0.0
            is_open = False
        busy_until = max(busy_until, min(stop, end))
        if name == last:
            open_us, is_open = 0.0, True
        counts[name] += begin <= start < end
        totals[name] += min(stop, end) - max(start, begin)
    walls = [after - before for before, after in pairwise(starts)]
    wall_us, idle_us = (end - begin) / steps, sum(idle.values()) / steps
    rows = [
        Row(name, counts[name] / steps, totals[name] / steps, totals[name] / (end - begin), idle[name] / steps)
        for name in sorted(totals, key=lambda name: -totals[name])
    ]
    return Table(
        steps=steps,
        wall_us=wall_us,
        median_us=statistics.median(walls),
        longest_us=max(walls),
        busy_us=wall_us - idle_us,
        idle_us=idle_us,
        between_us=between_us / steps,
        rows=tuple(rows),
    )


def short(name: str) -> str:
    """A kernel's name without its types: "void at::native::reduce_kernel<512, 1>(at::Tensor)" is "reduce_kernel"."""
    if name.startswith(("Memcpy", "Memset")):
        return name
    bare, before = re.sub(r"\(anonymous namespace\)::", "", name.removeprefix("void ")), ""
    bare = bare.partition("(")[0]
    while bare != before:
        bare, before = re.sub(r"<[^<>]*>", "", bare), bare
    bare = bare.partition("<")[0].strip()
    return bare if bare.startswith("aten::") else bare.rpartition("::")[2] or name


def _told(events: Sequence[Event]) -> str:
    counts = Counter(name for name, *_ in events)
    return ", ".join(f"{count} {name!r}" for name, count in counts.most_common(60)) or "no events at all"


def _rounded(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in fields.items()}
