"""Tokens a second over ten seconds, against sums by hand."""

from __future__ import annotations

import pytest

from dist_vlm.server import throughput
from dist_vlm.server.throughput import Throughput


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(throughput.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_of_nothing_the_mean_is_nothing(clock: Clock) -> None:
    assert Throughput().mean() == (0, 0)


def test_tokens_count_for_ten_seconds_and_then_no_more(clock: Clock) -> None:
    rate = Throughput()
    rate.add(100, 0)
    clock.now += 4
    rate.add(0, 30)
    assert rate.mean() == (10, 3)
    clock.now += 5.9
    assert rate.mean() == (10, 3)
    clock.now += 0.2
    assert rate.mean() == (0, 3)
    clock.now += 4
    assert rate.mean() == (0, 0)


def test_a_steady_rate_is_told_as_it_is(clock: Clock) -> None:
    rate = Throughput()
    for _ in range(3000):
        clock.now += 0.01
        rate.add(2, 1)
    prompt, answer = rate.mean()
    assert prompt == pytest.approx(200, rel=0.03)
    assert answer == pytest.approx(100, rel=0.03)


def test_no_more_is_kept_than_ten_seconds_need(clock: Clock) -> None:
    rate = Throughput()
    for _ in range(20_000):
        clock.now += 0.01
        rate.add(1, 1)
    assert len(rate._sums) <= 42
