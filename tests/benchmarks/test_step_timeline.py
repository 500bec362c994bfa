"""The whole way of a profile, on a CPU: its operators stand in for kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import step_timeline

from dist_vlm.config import ConfigError

INLINE = ["--executor", "inline", "--device", "cpu", "--kv-cache-memory-gib", "0.02", "--threads-per-rank", "1"]
OPERATORS = ["--first", "aten::lt", "--last", "aten::isfinite"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "STEP_TIMELINE", "TEARDOWN_CUPTI", "DISABLE_CUPTI_LAZY_REINIT"):
        monkeypatch.setenv(name, "")  # and afterwards what it was


def run(model: Path, out: Path, *words: str) -> dict[str, Any]:
    step_timeline.main(["--model", str(model), *INLINE, *OPERATORS, "--out", str(out), "--commit", "abc", *words])
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_a_table_for_each_batch(tiny_facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--load-format", "dummy", "--batches", "1", "3", "--steps", "8", "--skip", "2"]
    found = run(tiny_facts, tmp_path / "out.json", *words, "--traces", str(tmp_path / "traces"))
    assert (found["benchmark"], found["commit"], found["config"]["load_format"]) == ("step_timeline", "abc", "dummy")
    assert [table["batch"] for table in found["tables"]] == [1, 3]
    for table in found["tables"]:
        assert table["steps"] == 8 - step_timeline.UNSETTLED - 1
        rows = {row["name"]: row for row in table["rows"]}
        # Two layers of four products each, and the logits.
        assert rows["aten::mm"]["count"] == rows["aten::linear"]["count"] == 2 * 4 + 1
        assert 0 < table["busy_us"] <= table["wall_us"] <= table["longest_us"]
        assert table["busy_us"] + table["idle_us"] == pytest.approx(table["wall_us"], abs=0.01)
        assert table["unprofiled_us"] > 0
        assert table["unprofiled_us"] - table["busy_us"] == pytest.approx(table["unprofiled_idle_us"], abs=0.2)
    assert sorted(path.name for path in (tmp_path / "traces").glob("*.trace.json")) == ["1.trace.json", "3.trace.json"]
    assert "batch 3; without the profiler a step takes" in capsys.readouterr().out


def test_of_a_trace_what_ran_on_the_device_is_taken(tmp_path: Path) -> None:
    kinds = ["cpu_op", "cuda_runtime", "kernel", "gpu_memcpy", "gpu_memset", "Trace"]
    found = [{"ph": "X", "cat": kind, "name": kind, "ts": 10.5, "dur": 2.25} for kind in kinds]
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"traceEvents": [*found, {"ph": "M", "name": "process_name"}]}))
    on_gpu = [(name, 10.5, 12.75) for name in ("kernel", "gpu_memcpy", "gpu_memset")]
    assert list(step_timeline.events_of(trace, "cuda")) == on_gpu
    assert list(step_timeline.events_of(trace, "cpu")) == [("cpu_op", 10.5, 12.75)]


def test_a_batch_that_is_never_whole_is_told(tiny_facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_timeline, "MARGIN", -4)
    for name in ("2.json", "2.trace.json"):  # of a run before
        (tmp_path / name).write_text("{}")
    words = ["--load-format", "dummy", "--batches", "2", "--steps", "6", "--skip", "2", "--traces", str(tmp_path)]
    with pytest.raises(RuntimeError, match="there were never 14 steps of 2 in turn"):
        run(tiny_facts, tmp_path / "out.json", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batches", "0"], "'0': must be an integer, at least 1"),
        (["--steps", "4"], "'4': must be an integer, at least 6"),
        (["--skip", "-5"], "'-5': must be an integer, at least 1"),
        (["--batches", "2", "300"], "--batches = 300: must be at most scheduler.max_num_seqs, which is 256"),
        (["--steps", "4000"], "--steps = 4000: must be at most "),
    ],
)
def test_a_wrong_number_is_named(
    tiny_facts: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ConfigError)) as caught:
        step_timeline.main(["--model", str(tiny_facts), "--device", "cpu", *words])
    assert message in str(caught.value) + capsys.readouterr().err
