from __future__ import annotations

import pytest

from dist_vlm.executor import deadline as module
from dist_vlm.executor.deadline import Deadline


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_it_is_over_when_its_seconds_are(clock: list[float]) -> None:
    deadline = Deadline(5.0)
    clock[0] = 104.0
    assert (deadline.remaining_s, deadline.over) == (1.0, False)
    clock[0] = 106.0
    assert (deadline.remaining_s, deadline.over) == (0.0, True)


def test_a_lap_takes_the_time_since_the_one_before_and_parts_take_none_of_it(clock: list[float]) -> None:
    deadline = Deadline(5.0)
    clock[0] = 101.5
    deadline.lap("one")
    clock[0] = 103.5
    deadline.note("two: a part", 0.25)
    deadline.lap("two")
    assert deadline.laps == {"one": 1.5, "two: a part": 0.25, "two": 2.0}
