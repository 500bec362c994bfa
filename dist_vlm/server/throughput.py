"""Tokens a second over the last seconds."""

from __future__ import annotations

import time
from collections import deque

_WINDOW_S = 10.0
_STEP_S = 0.25


class Throughput:
    """Keeps sums of a quarter of a second each, as far back as the mean reaches."""

    def __init__(self) -> None:
        self._sums: deque[list[float]] = deque()

    def add(self, num_prompt: int, num_answer: int) -> None:
        now = time.monotonic()
        if not self._sums or now - self._sums[-1][0] > _STEP_S:
            self._sums.append([now, 0, 0])
            self._forget(now)
        self._sums[-1][1] += num_prompt
        self._sums[-1][2] += num_answer

    def mean(self) -> tuple[float, float]:
        """Tokens of prompts and of answers a second."""
        self._forget(time.monotonic())
        prompt = sum(one[1] for one in self._sums)
        answer = sum(one[2] for one in self._sums)
        return prompt / _WINDOW_S, answer / _WINDOW_S

    def _forget(self, now: float) -> None:
        while self._sums and now - self._sums[0][0] > _WINDOW_S:
            self._sums.popleft()
