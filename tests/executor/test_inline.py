"""One rank in this process answers as a rank of Ray's would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from stand_in import RUNNER, rank_config

from dist_vlm.executor import make_executor
from dist_vlm.executor.base import ExecutorError, StagedImage, StartError
from dist_vlm.executor.inline import InlineExecutor
from dist_vlm.workers.plan import NewSequence, SampledTokens, SamplingRow, Slice, StepPlan

PLAN = StepPlan(0, slices=(Slice(1, 5, 1, (), True),))
PIXELS = np.ones((1, 3, 2, 2), np.float32)


def inline(**model: object) -> InlineExecutor:
    return InlineExecutor(rank_config(1, model), runner=RUNNER)


def processed(step_id: int, name: str) -> StepPlan:
    """A step of a new sequence that asks for logits processors: the stand-in gives them the token 1006."""
    new = NewSequence(1, (1, 2), 2, (), SamplingRow(processors=name))
    return StepPlan(step_id, release=(1,), new=(new,), slices=PLAN.slices)


def tokens(executor: InlineExecutor) -> tuple[int, ...]:
    return executor.collect().sampled[0].token_ids


@pytest.fixture(autouse=True)
def others() -> None:
    """Threads of engines that other tests keep for a whole session."""
    OTHERS[:] = threading.enumerate()


OTHERS: list[threading.Thread] = []


def rank_threads() -> list[str]:
    """Of this test's ranks."""
    alive = [thread for thread in threading.enumerate() if thread not in OTHERS]
    return [thread.name for thread in alive if thread.name.startswith("inline-rank")]


class Held:
    """An executor whose step of `processed(..., "gate")` runs until `gate` is set."""

    def __init__(self) -> None:
        self.gate, self.begun = threading.Event(), threading.Event()
        self.executor = inline()
        self.executor.start()
        self.executor.set_processors("gate", (self.wait,))

    def wait(self, token: int) -> int:
        self.begun.set()
        assert self.gate.wait(30)
        return token


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.gate.set()
    held.executor.shutdown()


def test_plans_and_images() -> None:
    executor = inline()
    assert executor.start().num_blocks == 100
    pixels = np.ones((1, 3, 2, 2), np.float32)
    executor.stage("cat", "pixel_values", pixels)
    assert executor.poll_staged() == [StagedImage("cat", None)]
    assert executor.poll_staged() == []
    assert pixels.flags.writeable, "only the rank's view is read-only"
    executor.submit(PLAN)
    executor.submit(StepPlan(1, slices=PLAN.slices, encode=("cat",)))
    assert executor.collect().sampled == (SampledTokens(1, (1006,)),)
    assert executor.collect().sampled == (SampledTokens(1, (1018,)),)
    assert [result.step_id for result in executor.last_results] == [1]
    executor.unstage("cat")
    executor.shutdown()
    executor.shutdown()
    for call in (executor.check, lambda: executor.submit(PLAN)):
        with pytest.raises(ExecutorError, match="not running"):
            call()


def test_a_failing_stage_is_the_images_own() -> None:
    executor = inline(fault={"at": "stage", "do": "raise"})
    executor.start()
    executor.stage("cat", "pixel_values", np.ones((1, 3, 2, 2), np.float32))
    assert executor.poll_staged() == [StagedImage("cat", "FileNotFoundError: no model.safetensors in /nowhere")]
    executor.submit(PLAN)
    assert executor.collect().step_id == 0


def test_a_step_that_raises_ends_the_executor() -> None:
    executor = inline(fault={"at": 0, "do": "raise"})
    executor.start()
    executor.submit(PLAN)
    for _ in range(2):
        with pytest.raises(ExecutorError, match=r"step failed \(rank 0\): FileNotFoundError: no model"):
            executor.collect()
    with pytest.raises(ExecutorError, match="FileNotFoundError: no model"):
        executor.submit(StepPlan(1))
    with pytest.raises(ExecutorError, match="FileNotFoundError: no model"):
        executor.check()
    executor.shutdown()
    assert not rank_threads()


def test_the_driver_goes_on_while_a_step_runs(held: Held) -> None:
    executor = held.executor
    executor.submit(processed(0, "gate"))
    assert held.begun.wait(10)
    executor.stage("cat", "pixel_values", PIXELS)
    assert executor.poll_staged() == [StagedImage("cat", None)]
    executor.stage("dog", "pixel_values", PIXELS)
    executor.unstage("dog")
    executor.submit(StepPlan(1, slices=PLAN.slices, encode=("cat",)))
    assert not held.gate.is_set()
    held.gate.set()
    assert tokens(executor) == (1006,)
    assert tokens(executor) == (1018,)


def test_an_interrupt_of_the_wait_loses_no_result_and_leaves_no_thread(held: Held) -> None:
    executor = held.executor
    executor.submit(processed(0, "gate"))
    executor.submit(StepPlan(1, slices=PLAN.slices))
    assert held.begun.wait(10)
    # A shell that starts the tests in the background has them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            executor.collect()
    finally:
        signal.signal(signal.SIGINT, before)
    held.gate.set()
    assert [executor.collect().step_id for _ in range(2)] == [0, 1]
    executor.shutdown()
    assert not rank_threads()


def test_shutdown_waits_for_the_step_under_way(held: Held) -> None:
    held.executor.submit(processed(0, "gate"))
    assert held.begun.wait(10)
    threading.Timer(0.2, held.gate.set).start()
    held.executor.shutdown()
    assert held.gate.is_set()
    assert not rank_threads()


def test_an_idle_rank_is_heard_now_and_a_busy_one_when_its_step_began(held: Held) -> None:
    executor = held.executor
    assert inline().heard_at() == ()
    before = time.monotonic()
    (idle,) = executor.heard_at()
    assert before <= idle <= time.monotonic()
    executor.submit(StepPlan(0, slices=PLAN.slices))
    executor.collect()
    executor.submit(processed(1, "gate"))
    assert held.begun.wait(10)
    began_by = time.monotonic()
    (heard,) = executor.heard_at()
    assert before <= heard <= began_by
    time.sleep(0.05)
    assert executor.heard_at() == (heard,)
    executor.check()
    held.gate.set()
    executor.collect()
    freed = time.monotonic()
    executor.set_processors("gate", None)
    executor.submit(StepPlan(2, slices=PLAN.slices))
    executor.collect()
    assert executor.heard_at()[0] >= freed


FORGETFUL = """
from stand_in import RUNNER, rank_config
from dist_vlm.executor.inline import InlineExecutor
from dist_vlm.workers.plan import StepPlan

executor = InlineExecutor(rank_config(1, {"work_s": 0.3}), runner=RUNNER)
executor.start()
executor.submit(StepPlan(0))
executor.submit(StepPlan(1))
print(executor.collect().step_id)
"""


def test_a_program_that_forgets_it_ends() -> None:
    command = [sys.executable, "-c", FORGETFUL]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_processors_hold_for_plans_submitted_after_them() -> None:
    executor = inline(work_s=0.05)
    executor.start()
    assert executor.serves_logits_processors
    executor.submit(processed(0, "7"))
    executor.set_processors("7", (lambda token: token + 1, lambda token: 2 * token))
    executor.submit(processed(1, "7"))
    executor.set_processors("7", None)
    executor.submit(processed(2, "7"))
    assert [tokens(executor) for _ in range(3)] == [(1006,), (2014,), (1006,)]
    executor.shutdown()


@pytest.mark.parametrize("name", ["fake", "ray"])
def test_other_executors_refuse_processors(name: str) -> None:
    executor = make_executor(name, rank_config(1))
    assert not executor.serves_logits_processors
    with pytest.raises(ExecutorError, match="set_processors failed .*only the executor 'inline'"):
        executor.set_processors("7", (abs,))


def test_the_rank_takes_its_number_of_threads_and_the_driver_keeps_its(keep_threads: None) -> None:
    torch.set_num_threads(3)
    seen: list[int] = []
    executor = inline()
    executor.start()
    executor.set_processors("count", (lambda token: seen.append(torch.get_num_threads()) or token,))
    executor.stage("cat", "pixel_values", PIXELS)
    executor.submit(processed(0, "count"))
    executor.collect()
    executor.shutdown()
    assert seen == [1], "the stand-in's configuration says one"
    assert torch.get_num_threads() == 3


@pytest.fixture
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_as_many_plans_in_flight_as_configured(steps: int) -> None:
    executor = InlineExecutor(rank_config(1, {"deferred": [0]}), runner=RUNNER, max_steps_in_flight=steps)
    executor.start()
    for step_id in range(steps):
        executor.submit(StepPlan(step_id))
    with pytest.raises(RuntimeError, match=f"^{steps} plans are submitted"):
        executor.submit(StepPlan(steps))
    assert [executor.collect().step_id for _ in range(steps)] == list(range(steps))
    executor.shutdown()


@pytest.mark.parametrize("at", ["construct", "load", "allocate"])
def test_a_start_that_fails_names_its_stage(at: str) -> None:
    executor = inline(fault={"at": at, "do": "raise"})
    with pytest.raises(StartError) as caught:
        executor.start()
    assert caught.value.stage == ("load" if at == "construct" else at)
    assert caught.value.rank == 0


def test_several_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="world_size = 2"):
        make_executor("inline", rank_config(2))


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="executor = 'mp': must be one of ray, inline, fake"):
        make_executor("mp", rank_config(1))


def test_the_fake_by_name_takes_the_ranks_limits() -> None:
    executor = make_executor("fake", rank_config(1), num_blocks=5)
    assert executor.start().num_blocks == 5
