"""The fake answers from its script; what it refuses is in test_contract.py."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from dist_vlm.executor import fake
from dist_vlm.executor.base import ExecutorError, StagedImage
from dist_vlm.executor.contract import ContractError
from dist_vlm.executor.fake import FakeExecutor, checksum_token
from dist_vlm.workers.plan import (
    ImageFailure,
    ImageSpan,
    NewSequence,
    SampledTokens,
    SamplingRow,
    Slice,
    SlotFailure,
    StepPlan,
)

PIXELS = np.zeros((1, 3, 8, 8), np.float32)


def sequence(slot: int, tokens: tuple[int, ...], images: tuple[ImageSpan, ...] = ()) -> NewSequence:
    return NewSequence(slot, tokens, len(tokens), images, SamplingRow())


def started(**options: object) -> FakeExecutor:
    executor = FakeExecutor(num_blocks=8, block_size=4, **options)  # type: ignore[arg-type]
    assert executor.start().num_blocks == 8
    return executor


def staged(executor: FakeExecutor, key: str) -> None:
    executor.stage(key, "pixel_values", PIXELS)
    assert executor.poll_staged() == [StagedImage(key, None)]


def test_tokens_are_those_of_the_script_whether_prefilled_whole_or_in_chunks() -> None:
    told = (5, 6, 7, 8, 9)
    whole = started(next_token=lambda tokens, position: sum(tokens) + position)
    whole.submit(StepPlan(0, new=(sequence(0, told),), slices=(Slice(0, 0, 5, (0, 1), True),)))
    assert whole.collect().sampled == (SampledTokens(0, (40,)),)
    whole.submit(StepPlan(1, slices=(Slice(0, 5, 1, (), True),)))
    assert whole.collect().sampled == (SampledTokens(0, (35 + 40 + 6,)),)

    chunked = started(next_token=lambda tokens, position: sum(tokens) + position)
    chunked.submit(StepPlan(0, new=(sequence(0, told),), slices=(Slice(0, 0, 3, (0,), False),)))
    assert chunked.collect().sampled == ()
    chunked.submit(StepPlan(1, slices=(Slice(0, 3, 2, (3,), True),)))
    assert chunked.collect().sampled == (SampledTokens(0, (40,)),)


def test_default_tokens_survive_a_preemption() -> None:
    told = (1, 2, 3)
    executor = started()
    executor.submit(StepPlan(0, new=(sequence(0, told),), slices=(Slice(0, 0, 3, (0,), True),)))
    first = executor.collect().sampled[0].token_ids[0]
    again = NewSequence(1, (*told, first), 3, (), SamplingRow())
    executor.submit(StepPlan(1, release=(0,), new=(again,), slices=(Slice(1, 0, 4, (0,), True),)))
    assert executor.collect().sampled == (SampledTokens(1, (checksum_token((*told, first), 4),)),)


def test_two_plans_in_flight_are_answered_in_order() -> None:
    executor = started()
    executor.submit(StepPlan(0, new=(sequence(0, (1, 2)),), slices=(Slice(0, 0, 2, (0,), True),)))
    executor.submit(StepPlan(1, slices=(Slice(0, 2, 1, (), True),)))
    first, second = executor.collect(), executor.collect()
    assert (first.step_id, second.step_id) == (0, 1)
    assert second.sampled[0].token_ids[0] == checksum_token((1, 2, first.sampled[0].token_ids[0]), 3)
    assert executor.last_results == (second,)


class Clock:
    """Time that passes only where the test lets it, and in sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_steps_take_their_time_one_after_the_other_and_beside_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(fake, "time", clock)
    executor = started(step_delay_s=5.0)
    executor.submit(StepPlan(0))
    executor.submit(StepPlan(1))
    clock.now += 2
    executor.collect()
    assert clock.now == 105
    clock.now += 2
    executor.submit(StepPlan(2))
    executor.collect()
    assert clock.now == 110, "what the driver did meanwhile cost nothing"
    executor.collect()
    assert clock.now == 115
    clock.now += 2
    executor.submit(StepPlan(3))
    executor.collect()
    assert clock.now == 122, "a lone step begins when it is submitted"
    executor.submit(StepPlan(4))
    clock.now += 9
    executor.collect()
    assert clock.now == 131, "an answer that is there is not waited for"


def test_staging_arrives_after_the_polls_it_was_given_and_can_fail() -> None:
    executor = started(staging_polls=1, fail_stage={"b": "no room"})
    executor.stage("a", "pixel_values", PIXELS)
    executor.stage("b", "image_features", np.zeros((1, 2, 4), np.float32))
    assert executor.poll_staged() == []
    assert executor.poll_staged() == [StagedImage("a", None), StagedImage("b", "no room")]
    assert executor.staged_images == ("a", "b")
    executor.unstage("a")
    executor.unstage("b")
    assert executor.staged_images == ()


def test_an_image_that_fails_to_encode_leaves_out_only_the_slices_that_need_it() -> None:
    executor = started(fail_images={"bad": "broken pixels"})
    staged(executor, "bad")
    staged(executor, "good")
    new = (
        sequence(0, (1, 0, 0), (ImageSpan("bad", 1, 2),)),
        sequence(1, (1, 0, 0), (ImageSpan("good", 1, 2),)),
    )
    slices = (Slice(0, 0, 3, (0,), True), Slice(1, 0, 3, (1,), True))
    executor.submit(StepPlan(0, new=new, encode=("bad", "good"), slices=slices))
    # Sent before the failure is known: no mistake, and still no token.
    executor.submit(StepPlan(1, slices=(Slice(0, 3, 1, (), True), Slice(1, 3, 1, (), True))))
    result = executor.collect()
    assert result.image_failures == (ImageFailure("bad", "broken pixels"),)
    assert [sample.slot for sample in result.sampled] == [1]
    assert result.counters.num_encoded_images == 1
    assert [sample.slot for sample in executor.collect().sampled] == [1]
    with pytest.raises(ContractError, match="slot 0: it failed in step 0"):
        executor.submit(StepPlan(2, slices=(Slice(0, 4, 1, (2,), True),)))


def test_a_slot_fails_alone() -> None:
    executor = started(fail_slots={(0, 1): "not a number"})
    new = (sequence(0, (1,)), sequence(1, (2,)))
    executor.submit(StepPlan(0, new=new, slices=(Slice(0, 0, 1, (0,), True), Slice(1, 0, 1, (1,), True))))
    result = executor.collect()
    assert result.slot_failures == (SlotFailure(1, "not a number"),)
    assert [sample.slot for sample in result.sampled] == [0]
    executor.submit(StepPlan(1, release=(1,), slices=(Slice(0, 1, 1, (), True),)))
    assert executor.live_slots == (0,)


def test_a_dead_rank_is_raised_at_its_step_and_ever_after() -> None:
    executor = started(fail_steps={0: ExecutorError("step", "the process died", 1)})
    executor.submit(StepPlan(0))
    for call in (executor.collect, executor.poll_staged):
        with pytest.raises(ExecutorError, match="rank 1"):
            call()
    executor.shutdown()
    executor.shutdown()


def test_it_needs_neither_torch_nor_ray() -> None:
    code = "import sys, dist_vlm.executor.fake; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_ranks_are_heard_now_but_for_those_scripted_to_be_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(fake, "time", clock)
    executor = FakeExecutor(num_ranks=3)
    assert executor.heard_at() == ()
    assert [report.rank for report in executor.start().reports] == [0, 1, 2]
    assert executor.heard_at() == (100.0, 100.0, 100.0)
    executor.silent_since[1] = 98.5
    clock.now += 2
    assert executor.heard_at() == (102.0, 98.5, 102.0)


def test_ranks_that_are_lost_while_nobody_steps_are_told_by_every_call() -> None:
    executor = started()
    executor.check()
    executor.submit(StepPlan(0))
    executor.lose(ExecutorError("step", "its process died", 1))
    for call in (executor.check, executor.collect, executor.poll_staged, lambda: executor.submit(StepPlan(1))):
        with pytest.raises(ExecutorError, match=r"rank 1\): its process died"):
            call()
