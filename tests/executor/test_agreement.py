"""Ranks that answer differently are found and named."""

from __future__ import annotations

import dataclasses

import pytest

from dist_vlm.executor.agreement import agreed
from dist_vlm.executor.base import ExecutorError
from dist_vlm.workers.plan import ImageFailure, SampledTokens, StepCounters, StepResult


def answers(count: int) -> list[StepResult]:
    sampled = (SampledTokens(0, (7,)),)
    return [StepResult(3, rank, sampled, counters=StepCounters(busy_us=rank)) for rank in range(count)]


def test_equal_answers_are_rank_0s() -> None:
    results = answers(4)
    assert agreed(results, 3) is results[0]


def test_the_odd_rank_is_named() -> None:
    results = answers(4)
    results[2] = dataclasses.replace(results[2], image_failures=(ImageFailure("cat", "bad"),))
    with pytest.raises(ExecutorError, match="step 3: rank 2 from the others differ in image_failures") as caught:
        agreed(results, 3)
    assert caught.value.rank == 2


def test_of_two_ranks_neither_is_blamed() -> None:
    results = answers(2)
    results[1] = dataclasses.replace(results[1], sampled=())
    with pytest.raises(ExecutorError, match="ranks 0, 1 among themselves differ in sampled") as caught:
        agreed(results, 3)
    assert caught.value.rank is None


@pytest.mark.parametrize("change", [{"rank": 0}, {"step_id": 2}])
def test_an_answer_to_something_else_is_refused(change: dict[str, int]) -> None:
    results = answers(2)
    results[1] = dataclasses.replace(results[1], **change)
    with pytest.raises(ExecutorError, match="expected the answer of rank 1 to step 3"):
        agreed(results, 3)
