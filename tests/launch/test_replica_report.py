from __future__ import annotations

import pytest

from dist_vlm.engine.state import EngineState
from dist_vlm.launch import replica_report
from dist_vlm.launch.replica_report import ReplicaReport
from dist_vlm.sched.scheduler import SchedulerStats
from dist_vlm.workers.wire import WireError

STATE = EngineState(SchedulerStats(1, 2, 3, 4, 5, 6, 7, 8, 9), 1, 2, 3, 40, 5, 6, 7, 8, 9, 10, 11)


def test_what_is_written_is_read() -> None:
    assert replica_report.read("x", replica_report.written(STATE, (0.5, 1.5))) == ReplicaReport("x", STATE, (0.5, 1.5))


def test_a_replica_that_has_told_nothing() -> None:
    assert replica_report.read("x", {}) is None


def test_what_is_no_report_is_refused() -> None:
    with pytest.raises(WireError):
        replica_report.read("x", {"state": b"\xff", "silence": b"\xff"})


def test_reports_are_those_of_their_application() -> None:
    report = ReplicaReport("x", STATE, ())
    replica_report.arrive_at("one", lambda: [report])
    assert replica_report.latest_of("one") == [report]
    assert replica_report.latest_of("another") == []
