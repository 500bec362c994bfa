"""Every way a plan can break the contract is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dist_vlm.executor.contract import ContractError
from dist_vlm.executor.fake import FakeExecutor
from dist_vlm.workers.plan import ImageSpan, NewSequence, SamplingRow, Slice, StepPlan

PIXELS = np.zeros((1, 3, 8, 8), np.float32)
SPAN = (ImageSpan("cat", 2, 3),)


def sequence(slot: int, length: int = 6, images: tuple[ImageSpan, ...] = ()) -> NewSequence:
    return NewSequence(slot, tuple(range(length)), length, images, SamplingRow())


@pytest.fixture
def fake() -> FakeExecutor:
    """Slot 0 has run its 6 tokens in blocks 0, 1 and sampled one; image "cat" is staged; step 1 is next."""
    executor = FakeExecutor(
        num_blocks=8, block_size=4, max_num_seqs=4, max_num_batched_tokens=10, max_model_len=20, next_token=len_token
    )
    executor.start()
    executor.stage("cat", "pixel_values", PIXELS)
    executor.poll_staged()
    executor.submit(StepPlan(0, new=(sequence(0),), slices=(Slice(0, 0, 6, (0, 1), True),)))
    executor.collect()
    return executor


def len_token(tokens: object, position: int) -> int:
    return position


DECODE = Slice(0, 6, 1, (), True)
REFUSED = [
    (StepPlan(2), "step id 2 after 0"),
    (StepPlan(1, new=(sequence(0),)), "slot 0: the slot is taken"),
    (StepPlan(1, new=(sequence(4),)), "above max_num_seqs = 4"),
    (StepPlan(1, new=(sequence(1, 21),)), "above max_model_len = 20"),
    (StepPlan(1, new=(sequence(1, 0),)), "no tokens"),
    (StepPlan(1, new=(NewSequence(1, (1,), 2, (), SamplingRow()),)), "num_prompt_tokens 2"),
    (StepPlan(1, new=(sequence(1, 6, (ImageSpan("cat", 4, 3),)),)), "overlaps the one before or leaves"),
    (StepPlan(1, new=(sequence(1, 6, SPAN + (ImageSpan("dog", 4, 1),)),)), "overlaps the one before"),
    (StepPlan(1, release=(3,)), "slot 3 is released and holds no sequence"),
    (StepPlan(1, slices=(Slice(2, 0, 1, (4,), False),)), "slot 2: the slot holds no sequence"),
    (StepPlan(1, slices=(DECODE, DECODE)), "slot 0 has two slices"),
    (StepPlan(1, slices=(Slice(0, 5, 1, (), False),)), "starts at 5, not at 6"),
    (StepPlan(1, slices=(Slice(0, 7, 1, (), False),)), "starts at 7, not at 6"),
    (StepPlan(1, slices=(Slice(0, 6, 0, (), False),)), "0 positions"),
    (StepPlan(1, slices=(Slice(0, 6, 2, (), True),)), "ends at 8, only 7 tokens are known"),
    (StepPlan(1, new=(sequence(1),), slices=(Slice(1, 0, 6, (4,), True),)), "its blocks cover 4 positions"),
    (StepPlan(1, new=(sequence(1),), slices=(Slice(1, 0, 4, (4,), True),)), "samples position 4, whose token"),
    (StepPlan(1, new=(sequence(1),), slices=(Slice(1, 0, 4, (1,), False),)), "block 1 belongs to slot 0"),
    (StepPlan(1, new=(sequence(1),), slices=(Slice(1, 0, 4, (8,), False),)), "block 8 is outside"),
    (StepPlan(1, new=(sequence(1, 12),), slices=(Slice(1, 0, 11, (4, 5, 6), False),)), "max_num_batched_tokens = 10"),
    (StepPlan(1, encode=("dog",)), "'dog' is encoded and not staged"),
    (StepPlan(1, encode=("cat", "cat")), "encoded twice"),
    (
        StepPlan(1, new=(sequence(1, 6, SPAN),), encode=("cat",), slices=(Slice(1, 0, 1, (4,), False),)),
        "'cat' is encoded and lies under no slice",
    ),
    (StepPlan(1, drop_features=("cat",)), "'cat' are dropped and not held"),
    (StepPlan(1, copy_blocks=((2, 9),)), "block 9 is outside"),
    (StepPlan(1, copy_blocks=((2, 2),)), "copied onto itself"),
    (StepPlan(1, new=(sequence(1, 6, SPAN),), slices=(Slice(1, 0, 3, (4,), False),)), "not encoded, or dropped"),
]


@pytest.mark.parametrize(("plan", "problem"), REFUSED, ids=[problem for _, problem in REFUSED])
def test_refused(fake: FakeExecutor, plan: StepPlan, problem: str) -> None:
    with pytest.raises(ContractError, match=f"step .*{problem}"):
        fake.submit(plan)


def test_a_slice_before_the_image_needs_no_features(fake: FakeExecutor) -> None:
    fake.submit(StepPlan(1, new=(sequence(1, 6, SPAN),), slices=(Slice(1, 0, 2, (4,), False), DECODE)))
    fake.submit(StepPlan(2, encode=("cat",), slices=(Slice(1, 2, 2, (), False),)))
    with pytest.raises(ContractError, match="over image 'cat': its features are not encoded, or dropped"):
        fake.submit(StepPlan(3, drop_features=("cat",), slices=(Slice(1, 4, 2, (5,), True),)))


def test_features_are_encoded_once(fake: FakeExecutor) -> None:
    fake.submit(StepPlan(1, new=(sequence(1, 6, SPAN),), encode=("cat",), slices=(Slice(1, 0, 4, (4,), False),)))
    with pytest.raises(ContractError, match="features are held already"):
        fake.submit(StepPlan(2, encode=("cat",)))


def test_features_must_fill_the_span(fake: FakeExecutor) -> None:
    fake.stage("rows", "image_features", np.zeros((1, 2, 16), np.float32))
    fake.poll_staged()
    new = (sequence(1, 6, (ImageSpan("rows", 0, 3),)),)
    with pytest.raises(ContractError, match="3 positions for 2 feature rows"):
        fake.submit(StepPlan(1, new=new, encode=("rows",), slices=(Slice(1, 0, 4, (4,), False),)))


def test_a_block_is_given_again_only_after_its_last_step_was_collected(fake: FakeExecutor) -> None:
    fake.submit(StepPlan(1, slices=(DECODE,)))
    with pytest.raises(ContractError, match="block 1 is named by step 1, not yet collected"):
        fake.submit(StepPlan(2, release=(0,), new=(sequence(0, 2),), slices=(Slice(0, 0, 2, (1,), True),)))


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda fake: fake.stage("cat", "pixel_values", PIXELS), "staged twice"),
        (lambda fake: fake.stage("dog", "pixel_values", PIXELS[0]), "of shape"),
        (lambda fake: fake.stage("dog", "pixel_values", PIXELS.astype(np.float64)), "float64"),
        (lambda fake: fake.stage("dog", "pixel_values", PIXELS.astype(np.uint8)), "uint8"),
        (lambda fake: fake.stage("dog", "coded_pixels", PIXELS), "float32"),
        (lambda fake: fake.unstage("dog"), "was not staged"),
        (lambda fake: fake.collect(), "no plan submitted"),
        (lambda fake: fake.start(), "executor that is started"),
    ],
)
def test_refused_calls(fake: FakeExecutor, call: Callable[[FakeExecutor], object], problem: str) -> None:
    with pytest.raises(ContractError, match=problem):
        call(fake)


def test_an_image_is_not_unstaged_under_a_plan_that_encodes_it(fake: FakeExecutor) -> None:
    fake.submit(StepPlan(1, new=(sequence(1, 6, SPAN),), encode=("cat",), slices=(Slice(1, 0, 4, (4,), False),)))
    with pytest.raises(ContractError, match="an uncollected plan encodes it"):
        fake.unstage("cat")
    fake.collect()
    fake.unstage("cat")
