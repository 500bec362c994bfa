"""Measured figures, each beside its floor: as lines of text, and as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number.

    name: its key in JSON. label: in words. unit: a time ("s", "ms"), or a rate ("req/s").
    floor: what the device's own bandwidth and arithmetic would allow, in the same unit; None where none is known.
    is_rate: whether more is better.
    """

    name: str
    label: str
    value: float
    unit: str
    floor: float | None = None
    is_rate: bool = False

    @property
    def share(self) -> float | None:
        """How close to the floor, 1 on it: of a time floor / value, of a rate value / floor."""
        if self.floor is None or self.value <= 0 or self.floor <= 0:
            return None
        return self.value / self.floor if self.is_rate else self.floor / self.value

    def as_json(self) -> dict[str, Any]:
        return {
            "value": rounded(self.value),
            "unit": self.unit,
            "floor": rounded(self.floor),
            "share_of_floor": rounded(self.share),
        }


@dataclass(frozen=True, slots=True)
class Report:
    """What a measurement found. details: what is in the JSON alone."""

    figures: tuple[Figure, ...]
    details: dict[str, Any] = field(default_factory=dict)

    def also(self, **details: Any) -> Report:
        """A copy with more details."""
        return Report(self.figures, {**self.details, **details})

    def as_json(self) -> dict[str, Any]:
        return {"figures": {one.name: one.as_json() for one in self.figures}, **self.details}


def table(figures: Sequence[Figure]) -> str:
    """A line for each figure."""
    width = max(len(one.label) for one in figures)
    return "\n".join(
        f"{one.label:<{width}}  {_shown(one.value):>9} {one.unit}{_beside(one)}".rstrip() for one in figures
    )


def _beside(figure: Figure) -> str:
    if figure.floor is None or figure.share is None:
        return ""
    return f"   floor {_shown(figure.floor)} {figure.unit}, {100 * figure.share:.0f} % of it"


def _shown(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ") if abs(value) >= 1000 else f"{value:.3g}"


def rounded(value: float | None, digits: int = 6) -> float | None:
    """To significant digits; None stays."""
    if value is None or value == 0 or not math.isfinite(value):
        return value
    return round(value, digits - 1 - math.floor(math.log10(abs(value))))


def spread_ms(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and extremes of times, in milliseconds, with their number."""
    return {
        "count": len(seconds),
        "median_ms": rounded(1000 * statistics.median(seconds)),
        "min_ms": rounded(1000 * min(seconds)),
        "max_ms": rounded(1000 * max(seconds)),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The least of the values that at least `share` of them do not exceed; share in (0, 1]."""
    if not values or not 0 < share <= 1:
        raise ValueError(f"percentile {share!r} of {len(values)} values: must be in (0, 1], of at least one value")
    return sorted(values)[math.ceil(share * len(values)) - 1]
