"""Who is asked and when, over actors that answer when a test says so. Real ranks are asked in test_ray.py."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from dist_vlm.executor import heartbeat
from dist_vlm.executor.heartbeat import Heartbeat

PERIOD_S = 0.05


class Actor:
    """A rank that answers at once, unless it is silent; one that is dead answers with an error."""

    def __init__(self) -> None:
        self.silent = self.dead = False
        self.unanswered: list[object] = []
        self.num_pings = 0
        self.answered_at = 0.0
        self.groups: set[str] = set()

    @property
    def ping(self) -> Actor:
        return self

    def options(self, *, concurrency_group: str, enable_task_events: bool) -> Actor:
        assert not enable_task_events
        self.groups.add(concurrency_group)
        return self

    def remote(self) -> object:
        assert not self.unanswered, "the ping before is unanswered"
        self.num_pings += 1
        self.unanswered.append(object())
        return self.unanswered[0]


class FakeRay:
    """As much of Ray as a heartbeat calls.

    strays: calls after it was shut down. shut_down: whether that happens when the next answer is read.
    """

    def __init__(self, actors: Sequence[Actor]) -> None:
        self.actors = actors
        self.up = True
        self.shut_down = False
        self.strays = 0

    def is_initialized(self) -> bool:
        return self.up

    def wait(self, refs: list[object], *, num_returns: int, timeout: float) -> tuple[list[object], list[object]]:
        assert num_returns == 1
        end = time.monotonic() + timeout
        while True:
            self.strays += not self.up
            for actor in self.actors:
                if not actor.silent and actor.unanswered and actor.unanswered[0] in refs:
                    actor.answered_at = time.monotonic()
                    return actor.unanswered[:], [ref for ref in refs if ref not in actor.unanswered]
            if time.monotonic() > end:
                return [], refs
            time.sleep(0.001)

    def get(self, ref: object, *, timeout: float) -> int:
        (actor,) = (actor for actor in self.actors if ref in actor.unanswered)
        actor.unanswered.clear()
        self.up = not self.shut_down
        if actor.dead:
            raise RuntimeError("the actor died")
        return 1


class Rig:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.actors = [Actor(), Actor(), Actor()]
        self.ray = FakeRay(self.actors)
        monkeypatch.setitem(sys.modules, "ray", self.ray)  # type: ignore[arg-type]
        monkeypatch.setattr(heartbeat, "_PERIOD_S", PERIOD_S)
        self.heartbeat = Heartbeat(self.actors)

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < end, "it did not come true in time"
            time.sleep(0.002)

    def heard_after(self, moment: float) -> list[bool]:
        return [at > moment for at in self.heartbeat.heard_at()]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = Rig(monkeypatch)
    yield made
    for actor in made.actors:
        actor.silent = False
    made.heartbeat.stop()
    made.heartbeat.join()


def running() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name == "rank-heartbeat"]


def test_every_rank_is_asked_once_a_period(rig: Rig) -> None:
    began = time.monotonic()
    rig.until(lambda: min(actor.num_pings for actor in rig.actors) >= 6)
    assert time.monotonic() - began > 4 * PERIOD_S
    rig.heartbeat.stop()
    rig.heartbeat.join()
    assert len({actor.num_pings for actor in rig.actors}) == 1
    assert {group for actor in rig.actors for group in actor.groups} == {"status"}
    assert rig.heard_after(began) == [True] * 3


@pytest.mark.parametrize("how", ["silent", "dead"])
def test_a_rank_that_does_not_answer_stands_still_alone_until_it_does(rig: Rig, how: str) -> None:
    setattr(rig.actors[1], how, True)
    time.sleep(2 * PERIOD_S)  # an answer from before may still have been on its way
    stopped, at = rig.actors[1].num_pings, rig.heartbeat.heard_at()[1]
    moment = time.monotonic()
    rig.until(lambda: rig.heard_after(moment + 3 * PERIOD_S) == [True, False, True])
    assert rig.heartbeat.heard_at()[1] == at
    if how == "silent":
        assert rig.actors[1].num_pings <= stopped + 1, "it is not asked again before it has answered"
    setattr(rig.actors[1], how, False)
    moment = time.monotonic()
    rig.until(lambda: all(rig.heard_after(moment)))


def test_an_answer_is_noted_when_it_comes_and_not_when_the_others_have_come(rig: Rig) -> None:
    rig.actors[0].silent = True
    rig.until(lambda: bool(rig.actors[0].unanswered))
    delays = []
    for _ in range(5):
        moment = time.monotonic()
        rig.until(lambda since=moment: rig.heard_after(since)[1:] == [True, True])
        delays.append(rig.heartbeat.heard_at()[1] - rig.actors[1].answered_at)
    assert min(delays) < PERIOD_S / 4


def test_steps_count(rig: Rig) -> None:
    for actor in rig.actors:
        actor.silent = True
    time.sleep(2 * PERIOD_S)
    before, moment = rig.heartbeat.heard_at(), time.monotonic()
    rig.heartbeat.heard()
    assert len(set(rig.heartbeat.heard_at())) == 1
    assert moment <= rig.heartbeat.heard_at()[0] <= time.monotonic()
    assert max(before) < moment


@pytest.mark.parametrize("silent", [False, True])
def test_it_ends_when_told_and_asks_nobody_then(rig: Rig, silent: bool) -> None:
    rig.actors[2].silent = silent
    rig.until(lambda: rig.actors[0].num_pings > 2)
    rig.heartbeat.stop()
    rig.heartbeat.join()
    rig.until(lambda: not running())
    counts = [actor.num_pings for actor in rig.actors]
    time.sleep(2 * PERIOD_S)
    assert [actor.num_pings for actor in rig.actors] == counts


def test_it_calls_nothing_of_a_ray_that_was_shut_down(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.until(lambda: rig.actors[0].num_pings > 2)
    rig.ray.shut_down = True
    rig.until(lambda: not running())
    counts = [actor.num_pings for actor in rig.actors]
    time.sleep(2 * PERIOD_S)
    assert [actor.num_pings for actor in rig.actors] == counts
    assert rig.ray.strays == 0
    assert not caplog.records


def test_a_ray_that_breaks_ends_it_with_a_word(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wait(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Ray is gone")

    monkeypatch.setattr(rig.ray, "wait", wait)
    rig.until(lambda: not running())
    assert "can no longer be asked whether they live: ConnectionError: Ray is gone" in caplog.text
