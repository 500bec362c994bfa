"""One deadline over the stages of a start, and how long each took."""

from __future__ import annotations

import time


class Deadline:
    """`seconds` from now, on a clock that only goes forward.

    laps: stage -> seconds, in the order the stages ended.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.laps: dict[str, float] = {}
        self._lap_began = time.monotonic()
        self._end = self._lap_began + seconds

    @property
    def remaining_s(self) -> float:
        """Seconds left, 0.0 once they are over."""
        return max(0.0, self._end - time.monotonic())

    @property
    def over(self) -> bool:
        return self.remaining_s == 0.0

    def lap(self, stage: str) -> None:
        """Ends a stage: it took the time since the one before ended."""
        now = time.monotonic()
        self.laps[stage] = now - self._lap_began
        self._lap_began = now

    def note(self, part: str, seconds: float) -> None:
        """Adds what a part of the stage under way took, as somebody else has measured it."""
        self.laps[part] = seconds
