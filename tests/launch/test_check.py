"""The check itself: sound ranks pass, each planted fault is found, through the command as a user gives it."""

from __future__ import annotations

import argparse
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty_ranks
import pytest
import torch

from dist_vlm.config import EngineConfig
from dist_vlm.config_load import load_config
from dist_vlm.engine.rank_config import rank_config
from dist_vlm.executor.base import Executor
from dist_vlm.executor.inline import InlineExecutor
from dist_vlm.executor.ray import RayExecutor
from dist_vlm.executor.ray_cluster import RayCluster
from dist_vlm.launch import check, cli, reference
from dist_vlm.launch.check import rank_configs
from dist_vlm.launch.reference import Reference
from dist_vlm.llm import LLM
from dist_vlm.workers.models import read_spec

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "checkpoint"
COMMON = ["--device", "cpu", "--kv-cache-memory-gib", "0.1", "--threads-per-rank", "1", "--no-progress"]

# The first four probes: two pictures by themselves, a text, two pictures in one prompt.
NUM_PROBES = 4


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[RayCluster]:
    cluster = RayCluster()
    cluster.connect(None, num_cpus=4, use_gpus=False, timeout_s=60)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def answers_of_transformers() -> dict[str, Any]:
    """What a check made of transformers, by the type it ran in."""
    return {}


@pytest.fixture
def known_reference(monkeypatch: pytest.MonkeyPatch, answers_of_transformers: dict[str, Any]) -> None:
    """Asks transformers once for all checks in one type: what is planted in the ranks does not reach it."""
    ask = check._reference

    def known(config: EngineConfig, arguments: argparse.Namespace) -> Any:
        key = config.model.dtype
        if key not in answers_of_transformers:
            answers_of_transformers[key] = ask(config, arguments)
        return answers_of_transformers[key]

    monkeypatch.setattr(check, "_reference", known)


class Checked:
    """What a check said."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> None:
        file = folder / "figures.json"
        words = ("check", "--model", str(DEMO), "--probes", str(NUM_PROBES), "--json", str(file), *COMMON, *words)
        self.status = cli.main(words)
        self.out, self.err = capsys.readouterr()
        self.figures: dict[str, Any] = json.loads(file.read_text())
        self.runs: list[dict[str, Any]] = self.figures["runs"]


def plant(monkeypatch: pytest.MonkeyPatch, runner: type[Any]) -> None:
    """Lets engines run on ranks of this runner."""
    sound = LLM.from_config

    def from_config(config: EngineConfig) -> LLM:
        ranks, name = rank_config(config, read_spec(config.model.model)), faulty_ranks.runner_name(runner)
        single = config.parallel.tensor_parallel_size == 1
        executor: Executor = InlineExecutor(ranks, runner=name) if single else RayExecutor(ranks, runner=name)
        return sound(config, executor=executor)

    monkeypatch.setattr(LLM, "from_config", from_config)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("shared_ray")
def test_sound_ranks_pass_at_one_and_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checked = Checked(tmp_path, capsys, "--ranks", "1,2", "--executor", "inline")
    assert (checked.status, checked.err) == (0, "")
    assert checked.figures["passed"]
    assert [(run["ranks"], run["executor"], run["passed"]) for run in checked.runs] == [
        (1, "inline", True),
        (2, "ray", True),
    ]
    for run in checked.runs:
        # Float32 rounding, far inside of the tolerance, and not nothing: the sums are in another order.
        assert 0 < run["max_difference"] < 1e-4
        assert run["agreement"] == 1
        assert [len(run["probes"])] == [NUM_PROBES]
        assert all(probe["num_tokens"] == probe["num_agreed"] == 16 for probe in run["probes"])
    assert checked.out.count("16/16") == 2 * NUM_PROBES
    assert checked.out.count("  passed") == 2


@pytest.mark.usefixtures("known_reference")
@pytest.mark.parametrize(
    ("runner", "forced_fails"),
    [
        (faulty_ranks.WrongTheta, True),
        (faulty_ranks.OneAheadWhenDecoding, False),
        (faulty_ranks.SecondLikeliest, False),
    ],
)
def test_a_fault_of_a_single_rank_is_found(
    runner: type[Any],
    forced_fails: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch, runner)
    checked = Checked(tmp_path, capsys, "--executor", "inline")
    (run,) = checked.runs
    assert checked.status == 1
    assert checked.err.startswith("dist-vlm: error: the check failed at 1 rank: probe 0: noise 64x64: ")
    assert "FAILED: probe 0" in checked.out
    assert not run["passed"]
    assert not checked.figures["passed"]
    assert any(probe["forced_difference"] > 0.05 for probe in run["probes"]) == forced_fails
    if runner is faulty_ranks.SecondLikeliest:
        # The logits are right, so the gaps alone tell.
        assert run["max_difference"] < 1e-4
        assert run["max_gap"] > 0.05
        assert run["agreement"] == 0
    else:
        assert run["max_difference"] > 0.05


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("shared_ray", "known_reference")
@pytest.mark.parametrize("runner", [faulty_ranks.SwappedShards, faulty_ranks.BrokenGather])
def test_a_fault_between_two_ranks_is_found(
    runner: type[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, runner)
    checked = Checked(tmp_path, capsys, "--ranks", "2")
    assert checked.status == 1
    assert "the check failed at 2 ranks: probe 0" in checked.err
    assert checked.runs[0]["max_difference"] > 0.05
    assert all(probe["error"] is None for probe in checked.runs[0]["probes"])


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("shared_ray", "known_reference")
def test_ranks_that_disagree_are_a_finding_and_the_next_count_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, faulty_ranks.GatherBrokenOnOneRank)
    checked = Checked(tmp_path, capsys, "--ranks", "2,1")
    assert checked.status == 1
    assert [(run["ranks"], run["passed"]) for run in checked.runs] == [(2, False), (1, True)]
    assert "ranks disagree in step 0" in checked.runs[0]["faults"][0]
    assert "the check failed at 2 ranks: step failed" in checked.err


def test_sixteen_bits_are_held_to_what_transformers_loses_in_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = Checked(tmp_path, capsys, "--executor", "inline", "--dtype", "bfloat16")
    assert (checked.status, checked.err) == (0, "")
    assert "in bfloat16: tolerance" in checked.out
    assert "; transformers itself in bfloat16 differs by" in checked.out
    # A bfloat16 product is off by about 2**-9 of itself; logits here are up to 25.
    assert 0.05 < checked.figures["tolerance"] < 2
    assert 0.01 < checked.runs[0]["max_difference"] <= checked.figures["tolerance"]


def test_ranks_start_when_transformers_model_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one GPU both would not fit."""
    make, release, start = Reference.__init__, reference.release_memory, LLM.from_config
    models, events = [], []

    def made(self: Reference, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        models.append(weakref.ref(self._model))

    def released(device: str) -> None:
        release(device)
        events.append("the model is gone" if models[0]() is None else "the model is there")

    def started(config: EngineConfig) -> LLM:
        events.append("ranks start")
        return start(config)

    monkeypatch.setattr(Reference, "__init__", made)
    monkeypatch.setattr(reference, "release_memory", released)
    monkeypatch.setattr(LLM, "from_config", started)
    checked = Checked(tmp_path, capsys, "--executor", "inline", "--probes", "1")
    assert checked.status == 0
    assert events == ["the model is gone", "ranks start"]


def test_the_memory_of_a_gpu_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    reference.release_memory("cpu")
    assert calls == []
    reference.release_memory("cuda")
    assert calls == ["emptied"]


def test_a_tolerance_that_is_given_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checked = Checked(tmp_path, capsys, "--executor", "inline", "--tolerance", "1e-9", "--probes", "1")
    assert checked.status == 1
    assert checked.figures["tolerance"] == 1e-9
    assert "tolerance 1e-09\n" in checked.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "1,0"], "argument --ranks: '0': must be an integer, at least 1"),
        (["--ranks", ""], "argument --ranks: '': must be an integer, at least 1"),
        (["--ranks", "1,3"], "attention heads do not divide into 3 equal parts"),
        (["--probes", "x"], "argument --probes: 'x': must be an integer, at least 1"),
        (["--tolerance", "nan"], "argument --tolerance: 'nan': must be a number above 0"),
        (["--tolerance", "-1"], "argument --tolerance"),
        (["--executor", "fake"], "executor = 'fake': must be ray or inline"),
        (["--load-format", "dummy"], "transformers has no such weights"),
        (["--disable-image-processor"], "takes no pictures, only tensors"),
        (["--reference-device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_what_cannot_be_checked_is_one_line_and_status_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", "--model", str(DEMO), "--device", "cpu", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_sequence_too_short_for_any_probe_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "--model", str(DEMO), "--executor", "inline", "--probes", "1", *COMMON, "--max-model-len", "30"]
    assert cli.main(words) == 2
    assert "max_model_len = 30: must be at least 44 for the probes" in capsys.readouterr().err


def test_each_number_of_ranks_is_one_group_with_its_share_of_the_machine(tmp_path: Path) -> None:
    file = tmp_path / "launch.yaml"
    file.write_text(f"model: {{model: {DEMO}}}\nparallel: {{device: cpu, replicas: 2, tensor_parallel_size: 4}}\n")
    one, two = rank_configs(load_config(str(file)), (1, 2))
    assert (one.parallel.tensor_parallel_size, one.parallel.executor, one.parallel.replicas) == (1, "ray", 1)
    assert (two.parallel.tensor_parallel_size, two.parallel.executor, two.parallel.replicas) == (2, "ray", 1)
    assert one.parallel.threads_per_rank is not None and two.parallel.threads_per_rank is not None
    assert one.parallel.threads_per_rank >= two.parallel.threads_per_rank
