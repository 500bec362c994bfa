"""The parity matrix: its axes, all of it, and a small part in which every pair of values occurs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

AXES = {
    "checkpoint": ("demo", "tiny"),
    "ranks": (1, 2, 4),
    "budget": (7, 64, 8192),
    "cache": ("ample", "scarce"),
    "form": ("pixels", "features", "text"),
    "caches": ("kept", "off"),
    "steps": (1, 2),
}


@dataclass(frozen=True)
class Point:
    """ranks: tensor-parallel ranks. budget: tokens in a step. cache: whether KV blocks run out. form: of the images.
    caches: whether KV blocks and encoded images are kept for later requests. steps: in flight.
    """

    checkpoint: str
    ranks: int
    budget: int
    cache: str
    form: str
    caches: str
    steps: int

    @property
    def transport(self) -> str:
        """Every number of ranks meets both: each change of transport costs a start of the ranks."""
        return "direct" if (self.checkpoint == "tiny") == (self.ranks == 2) else "ray"

    @property
    def halve_step_tokens(self) -> int | None:
        """Half of the points are on ranks that compute longer steps in halves."""
        return 24 if self.transport == "direct" else None

    @property
    def name(self) -> str:
        sizes = f"{self.ranks}-ranks-{self.budget}-tokens-{self.steps}-steps"
        return f"{self.checkpoint}-{sizes}-{self.cache}-{self.form}-{self.caches}"


def full() -> list[Point]:
    """Every point, those on the same ranks together, so that ranks start once for each group."""
    return [Point(*values) for values in itertools.product(*AXES.values())]


def pairwise() -> list[Point]:
    """A part of `full()` that holds every pair of values of every two axes: chosen greedily, the same each time."""
    points, missing = full(), {pair for point in full() for pair in _pairs(point)}
    chosen: list[Point] = []
    while missing:
        best = max(points, key=lambda point: len(missing & _pairs(point)))
        missing -= _pairs(best)
        chosen.append(best)
    return sorted(chosen, key=points.index)


def _pairs(point: Point) -> set[tuple[tuple[str, object], ...]]:
    values = [(axis, getattr(point, axis)) for axis in AXES]
    return set(itertools.combinations(values, 2))
