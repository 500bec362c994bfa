"""A finished step is ready and gives what it holds; an answer of several crosses the wire."""

from __future__ import annotations

from dist_vlm.workers import wire
from dist_vlm.workers.pending import FinishedStep, FinishedSteps, PendingStep
from dist_vlm.workers.plan import SampledTokens, StepResult


def test_a_finished_step_is_ready() -> None:
    result = StepResult(3, 1, (SampledTokens(0, (7,)),))
    pending: PendingStep = FinishedStep(result)
    assert pending.ready()
    assert pending.result() is result


def test_answers_of_no_and_of_several_steps_come_back_equal() -> None:
    results = tuple(StepResult(step_id, 0, (SampledTokens(0, (7,)),)) for step_id in (3, 4))
    for answer in (FinishedSteps(()), FinishedSteps(results)):
        assert wire.decode(FinishedSteps, wire.encode(answer)) == answer
