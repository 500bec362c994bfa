"""A rank's stages in this process, over a runner that computes nothing."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading

import numpy as np
import pytest

from dist_vlm.version import __version__
from dist_vlm.workers import wire
from dist_vlm.workers.comm import Communicator
from dist_vlm.workers.config import LoadReport, RankConfig
from dist_vlm.workers.failure import RankError
from dist_vlm.workers.pending import FinishedStep, FinishedSteps, PendingStep
from dist_vlm.workers.plan import StepPlan, StepResult
from dist_vlm.workers.wire import WireError
from dist_vlm.workers.worker import Worker, _gpu_ordinal

CONFIG = RankConfig(
    "model",
    "float32",
    "cpu",
    "dummy",
    0,
    1,
    16,
    64,
    4,
    32,
    0.9,
    None,
    1,
    "reference",
    False,
    "group",
    None,
    None,
    0,
    256,
    True,
)


class OnDevice:
    """A step of a GPU: ready when the test says so, and ended by whoever waits for it."""

    def __init__(self, step_id: int) -> None:
        self.step_id, self.ended, self.broken = step_id, False, False

    def ready(self) -> bool:
        return self.ended

    def result(self) -> StepResult:
        if self.broken:
            raise RuntimeError("an illegal memory access")
        self.ended = True
        return StepResult(self.step_id, 0)


class Recorder:
    """Writes down its calls; `model` names the one that fails, or "device" for steps that end later."""

    def __init__(self, config: RankConfig, comm: Communicator) -> None:
        self.config, self.comm = config, comm
        self.calls: list[object] = []
        self.launched: list[OnDevice] = []
        self.processors: dict[str, tuple[object, ...]] = {}

    def _call(self, *call: object) -> None:
        if self.config.model == call[0]:
            raise OSError("broken\nin two lines")
        self.calls.append(call)

    def load(self) -> LoadReport:
        self._call("load")
        return LoadReport(0, 0, 0, 0, 0, 1, 9, {}, 0)

    def allocate(self, num_blocks: int) -> None:
        self._call("allocate", num_blocks)

    def stage(self, key: str, kind: str, array: np.ndarray) -> None:
        self._call("stage", key, kind, threading.current_thread().name)

    def unstage(self, key: str) -> None:
        self._call("unstage", key)

    def launch(self, plan: StepPlan) -> PendingStep:
        self._call("step", plan)
        if self.config.model == "device":
            self.launched.append(OnDevice(plan.step_id))
            return self.launched[-1]
        return FinishedStep(StepResult(plan.step_id, 0))


def worker(**changes: object) -> Worker:
    return Worker(wire.encode(dataclasses.replace(CONFIG, **changes)), f"{__name__}:Recorder")  # type: ignore[arg-type]


def test_the_stages_in_order() -> None:
    rank = worker()
    assert rank.prepare_seconds() == {}
    assert rank.prepare("127.0.0.1", 5.0) == (__version__, 0)
    assert list(rank.prepare_seconds()) == ["runner", "model", "device"]
    assert wire.decode(LoadReport, rank.load()).num_blocks == 9
    rank.allocate(7)
    assert rank.progress() == -1
    plan = StepPlan(4)
    assert wire.decode(FinishedSteps, rank.step(wire.encode(plan))) == FinishedSteps((StepResult(4, 0),))
    assert rank.progress() == 4
    thread = threading.Thread(target=rank.stage, args=("cat", "pixel_values", np.zeros(1)), name="other")
    thread.start()
    thread.join()
    rank.unstage("cat")
    runner = rank._runner
    assert runner.calls == [
        ("load",),
        ("allocate", 7),
        ("step", plan),
        ("stage", "cat", "pixel_values", "other"),
        ("unstage", "cat"),
    ]
    assert runner.comm.world_size == 1
    rank.close()


@pytest.mark.parametrize("stage", ["load", "allocate", "stage", "unstage", "step"])
def test_a_failure_names_rank_stage_and_cause_in_one_line(stage: str) -> None:
    rank = worker(model=stage)
    rank.prepare("127.0.0.1", 5.0)
    calls = {
        "load": rank.load,
        "allocate": lambda: rank.allocate(1),
        "stage": lambda: rank.stage("cat", "pixel_values", np.zeros(1)),
        "unstage": lambda: rank.unstage("cat"),
        "step": lambda: rank.step(wire.encode(StepPlan(0))),
    }
    if stage != "load":
        rank.load()
    with pytest.raises(RankError) as caught:
        calls[stage]()
    assert (caught.value.rank, caught.value.stage) == (0, stage)
    assert caught.value.cause == "OSError: broken in two lines"
    assert rank.progress() == -1


def on_device() -> tuple[Worker, list[OnDevice]]:
    rank = worker(model="device")
    rank.prepare("127.0.0.1", 5.0)
    rank.load()
    return rank, rank._runner.launched


def finished(answer: bytes) -> list[int]:
    return [result.step_id for result in wire.decode(FinishedSteps, answer).results]


def step(rank: Worker, step_id: int) -> list[int]:
    return finished(rank.step(wire.encode(StepPlan(step_id))))


def test_an_answer_waits_for_all_but_the_newest_step_and_a_flush_for_all() -> None:
    rank, launched = on_device()
    assert step(rank, 0) == []
    assert (launched[0].ended, rank.progress()) == (False, -1)
    assert step(rank, 1) == [0]
    assert (launched[1].ended, rank.progress()) == (False, 0)
    assert finished(rank.step(b"")) == [1]
    assert finished(rank.step(b"")) == []
    assert rank.progress() == 1


def test_an_answer_brings_what_has_ended_by_itself() -> None:
    rank, launched = on_device()
    launch = rank._runner.launch

    def at_once(plan: StepPlan) -> PendingStep:
        pending = launch(plan)
        launched[-1].ended = True
        return pending

    rank._runner.launch = at_once
    assert step(rank, 0) == [0]
    rank._runner.launch = launch
    assert step(rank, 1) == []
    launched[1].ended = True
    rank._runner.launch = at_once
    assert step(rank, 2) == [1, 2]
    assert finished(rank.step(b"")) == []


def test_a_step_that_fails_on_the_device_fails_the_message_that_waits_for_it() -> None:
    rank, launched = on_device()
    assert step(rank, 0) == []
    launched[0].broken = True
    with pytest.raises(RankError, match="rank 0, step: RuntimeError: an illegal memory access"):
        step(rank, 1)
    assert rank.progress() == -1


def test_processors_are_registered_by_name_and_forgotten() -> None:
    rank, _ = on_device()
    rank.set_processors("7", [max, min])
    rank.set_processors("8", (abs,))
    assert rank._runner.processors == {"7": (max, min), "8": (abs,)}
    rank.set_processors("7", None)
    rank.set_processors("7", None)
    assert rank._runner.processors == {"8": (abs,)}


def test_only_a_thread_that_computes_takes_the_ranks_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    taken: list[tuple[str, int]] = []
    monkeypatch.setattr(
        torch, "set_num_threads", lambda number: taken.append((threading.current_thread().name, number))
    )
    rank = worker(num_threads=3)
    start = threading.Thread(target=lambda: (rank.prepare("127.0.0.1", 5.0), rank.load()), name="computing")
    start.start()
    start.join()
    rank.stage("cat", "pixel_values", np.zeros(1))
    rank.unstage("cat")
    assert taken == [("computing", 3)]
    rank.step(wire.encode(StepPlan(0)))
    assert taken == [("computing", 3), (threading.current_thread().name, 3)]


def test_a_runner_that_is_not_there_fails_at_import() -> None:
    rank = Worker(wire.encode(CONFIG), "dist_vlm.workers.nowhere:Runner")
    with pytest.raises(RankError, match="rank 0, import: ModuleNotFoundError"):
        rank.prepare("127.0.0.1", 5.0)


def test_a_gpu_that_is_not_there_fails_at_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RankError, match="rank 0, device: RuntimeError: torch sees no GPU"):
        worker(device="cuda").prepare("127.0.0.1", 5.0)


def test_a_group_that_nobody_hosts_fails_at_join() -> None:
    rank = worker(rank=1, world_size=2)
    assert rank.prepare("127.0.0.1", 5.0) == (__version__, 0)
    with pytest.raises(RankError, match="rank 1, join: "):
        rank.join("127.0.0.1", 9, 1.0, 1.0)


def test_bytes_that_are_no_config_are_refused() -> None:
    with pytest.raises(WireError):
        Worker(b"nonsense")


def test_importing_and_building_a_worker_costs_no_torch() -> None:
    code = "import sys, dist_vlm.workers.worker; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("given", "visible", "ordinal"),
    [(["3"], None, 3), (["5"], "4,5,6", 1), (["GPU-b"], "GPU-a,GPU-b", 1), (["1"], "", 1)],
)
def test_the_gpu_that_ray_gave_becomes_the_processes_own_ordinal(
    monkeypatch: pytest.MonkeyPatch, given: list[str], visible: str | None, ordinal: int
) -> None:
    import ray

    class Context:
        def get_accelerator_ids(self) -> dict[str, list[str]]:
            return {"GPU": given}

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _gpu_ordinal() == ordinal
