from __future__ import annotations

import datetime
import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from dist_vlm import EngineConfig
from dist_vlm.launch import bench_record
from dist_vlm.launch.bench_rates import DeviceRates
from dist_vlm.launch.bench_record import git_commit, record


def test_a_record_says_when_where_and_with_what() -> None:
    config = EngineConfig.from_fields(model="m", max_num_seqs=7)
    rates = DeviceRates(4.27e12, 667.94e12, "bfloat16")
    found = record("steps", config, settings={"rounds": 3}, rates=rates, commit="abc")
    assert json.loads(json.dumps(found))["config"]["max_num_seqs"] == 7
    assert (found["benchmark"], found["commit"], found["settings"]) == ("steps", "abc", {"rounds": 3})
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(found["date"])
    assert 0 <= age.total_seconds() < 60
    assert found["software"]["torch"] == version("torch")
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["memory_gib"] > 0
    assert found["device_rates"] == {
        "copy_gb_per_s": 4270.0,
        "matmul_tflop_per_s": 667.9,
        "matmul_dtype": "bfloat16",
    }
    assert record("steps", config, settings={}, rates=None, commit="abc")["device_rates"] is None


def test_a_commit_is_that_of_the_checkout_itself(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", "-C", str(tmp_path), *names, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert git_commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "first")
    short = git("rev-parse", "HEAD")[:7]
    assert git_commit(tmp_path) == short
    (tmp_path / "a").write_text("2")
    assert git_commit(tmp_path) == f"{short}+changes"
    # A package that only lies in somebody's checkout is not of its commit.
    (tmp_path / "site-packages").mkdir()
    assert git_commit(tmp_path / "site-packages") is None


def test_a_machine_without_git_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(bench_record._ROOT) is None
