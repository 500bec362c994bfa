"""One rank in this process answers as a rank of Ray's would."""

from __future__ import annotations

import numpy as np
import pytest
from stand_in import RUNNER, rank_config

from dist_vlm.executor import make_executor
from dist_vlm.executor.base import ExecutorError, StagedImage, StartError
from dist_vlm.executor.inline import InlineExecutor
from dist_vlm.workers.plan import SampledTokens, Slice, StepPlan

PLAN = StepPlan(0, slices=(Slice(1, 5, 1, (), True),))


def inline(**model: object) -> InlineExecutor:
    return InlineExecutor(rank_config(1, model), runner=RUNNER)


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
    with pytest.raises(ExecutorError, match="not running"):
        executor.submit(PLAN)


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
    for _ in range(2):
        with pytest.raises(ExecutorError, match=r"step failed \(rank 0\): FileNotFoundError: no model"):
            executor.submit(PLAN)


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
