"""How often lost ranks are started again before the engine gives up."""

from __future__ import annotations

import time
from collections import deque

_HOUR_S = 3600.0


class RestartBudget:
    """most_an_hour: restarts within any hour; 0 for none at all."""

    def __init__(self, most_an_hour: int) -> None:
        self.most_an_hour = most_an_hour
        self._taken_at: deque[float] = deque()

    def take(self) -> bool:
        """Whether there may be another one now; it then counts."""
        now = time.monotonic()
        while self._taken_at and now - self._taken_at[0] >= _HOUR_S:
            self._taken_at.popleft()
        if len(self._taken_at) >= self.most_an_hour:
            return False
        self._taken_at.append(now)
        return True
