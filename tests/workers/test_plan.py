"""The plan's small derived quantities, and that plans cannot be written to."""

from __future__ import annotations

import dataclasses

import pytest

from dist_vlm.workers.plan import ImageSpan, Slice, StepPlan


def test_num_tokens_adds_up_the_slices() -> None:
    assert StepPlan(0).num_tokens == 0
    assert StepPlan(0, slices=(Slice(0, 5, 7, (), False), Slice(1, 0, 1, (), True))).num_tokens == 8


def test_a_span_ends_after_its_last_position() -> None:
    assert ImageSpan("cat", 4, 3).end == 7


def test_a_plan_is_frozen_and_stays_small() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        StepPlan(0).step_id = 1  # type: ignore[misc]
    assert len(dataclasses.fields(StepPlan)) <= 10
