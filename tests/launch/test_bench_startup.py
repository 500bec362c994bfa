from __future__ import annotations

import pytest

from dist_vlm import EngineConfig
from dist_vlm.launch.bench_startup import Settings, Started, measure, report, stalls

STARTED = Started(
    ready=107.0,
    first_token=107.5,
    first_ended=108.0,
    news=[200.0, 200.25, 200.25, 200.5, 201.5, 201.75],
    num_tokens=5,
    stages={"load": 6.0},
)


def test_the_start_counts_from_the_process_and_a_stall_from_any_news_to_the_next() -> None:
    found = report(STARTED, 100.0)
    assert {one.name: (one.value, one.unit) for one in found.figures} == {
        "ready": (7.0, "s"),
        "first_token": (7.5, "s"),
        "longest_stall": (1000.0, "ms"),
        "stall_p99": (1000.0, "ms"),
    }
    assert stalls(STARTED.news) == [0.25, 0.0, 0.25, 1.0, 0.25]
    assert found.details["first_answer_s"] == 8.0
    assert found.details["seconds"] == 1.75
    assert found.details["longest_stalls"][0] == {"at_s": 0.5, "ms": 1000.0}
    assert [one["ms"] for one in found.details["longest_stalls"]] == [1000.0, 250.0, 250.0, 250.0, 0.0]
    assert found.details["start_stages_s"] == {"load": 6.0}


def test_a_start_that_fails_says_why() -> None:
    config = EngineConfig.from_fields(model="/absent/model", executor="inline", device="cpu")
    with pytest.raises(RuntimeError, match="the started process failed: .*/absent/model"):
        measure(config, Settings(1, 1, 1))


def test_a_process_that_leaves_nothing_behind_is_told_by_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_vlm.launch.bench_startup._CHILD", "dist_vlm.launch.no_such_module")
    config = EngineConfig.from_fields(model="/absent/model", executor="inline", device="cpu")
    with pytest.raises(RuntimeError, match="the started process ended with status 1"):
        measure(config, Settings(1, 1, 1))
