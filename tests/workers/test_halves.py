"""A step in two halves: where it is cut, the order of what happens, and that nothing of the answer changes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_vlm.workers.comm import single_rank
from dist_vlm.workers.halves import Beside, Forward, Reduction, cut, run_in_halves, run_whole
from dist_vlm.workers.plan import NewSequence, SamplingRow, Slice, StepPlan
from dist_vlm.workers.runner import Runner

from .test_runner import IMAGE, PROMPT, pixels, rank_config, tokens_by_slot
from .thread_comm import on_ranks, thread_comms


def tokens_of(slices: list[Slice]) -> list[tuple[int, int, bool]]:
    """Every token, and whether it is sampled after."""
    return [
        (piece.slot, position, piece.sample and position == piece.start + piece.count - 1)
        for piece in slices
        for position in range(piece.start, piece.start + piece.count)
    ]


@given(counts=st.lists(st.integers(1, 700), min_size=1, max_size=6), least=st.integers(2, 900), data=st.data())
def test_both_halves_together_are_the_step(counts: list[int], least: int, data: Any) -> None:
    slices = [
        Slice(slot, data.draw(st.integers(0, 50)), count, (), data.draw(st.booleans()))
        for slot, count in enumerate(counts)
    ]
    halves = cut(slices, min_tokens=least)
    if sum(counts) < least:
        assert halves is None
        return
    assert halves is not None
    first, second = ([*half] for half in halves)
    assert tokens_of(first) + tokens_of(second) == tokens_of(slices)
    left, right = (sum(piece.count for piece in half) for half in (first, second))
    assert 0 < left <= right
    assert right - left <= 1 or (left % 128 == 0 and right - left <= 257)


def test_a_single_token_has_no_halves() -> None:
    assert cut([Slice(0, 5, 1, (), True)], min_tokens=2) is None


class Tape:
    """Writes down what happens, and makes sums that are told apart."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def forward(self, name: str, num_sums: int) -> Forward:
        x = torch.zeros(1)
        for index in range(num_sums):
            self.events.append(f"compute {name}{index}")
            x, _ = yield Reduction(x + 1, None, torch.tensor([float(ord(name))]))
        return x

    def reduce(self, wanted: Reduction) -> tuple[torch.Tensor, torch.Tensor]:
        self.events.append(f"sum {chr(int(wanted.norm))}{int(wanted.partial) - 1}")
        return wanted.partial, wanted.partial


class TapedBeside(Beside):
    """Tells when a sum is waited for; none is made before."""

    def __init__(self, tape: Tape) -> None:
        super().__init__(torch.device("cpu"))
        self._tape = tape

    def start(self, work: Any) -> Any:
        before = len(self._tape.events)
        result = work()
        (made,) = self._tape.events[before:]

        def wait() -> Any:
            self._tape.events.append(f"wait {made.removeprefix('sum ')}")
            return result

        return wait


def test_each_half_is_computed_between_the_start_and_the_end_of_the_others_sum() -> None:
    tape = Tape()
    first, second = run_in_halves(tape.forward("a", 2), tape.forward("b", 3), tape.reduce, TapedBeside(tape))
    assert (float(first), float(second)) == (2, 3)
    assert tape.events == [
        "compute a0", "sum a0", "compute b0", "sum b0",
        "wait a0", "compute a1", "sum a1", "wait b0", "compute b1", "sum b1",
        "wait a1", "wait b1", "compute b2", "sum b2",
        "wait b2",
    ]  # fmt: skip


def test_a_forward_alone_makes_each_sum_at_once() -> None:
    tape = Tape()
    assert float(run_whole(tape.forward("a", 2), tape.reduce)) == 2
    assert tape.events == ["compute a0", "sum a0", "compute a1", "sum a1"]


@pytest.mark.gpu
def test_what_a_sum_reads_is_not_written_before_the_sum_has_ended() -> None:
    device = torch.device("cuda")
    beside, size = Beside(device), 1 << 22

    def slow_copy(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        torch.cuda._sleep(2_000_000)
        return x.clone(), x

    for value in range(1, 20):
        wait = beside.start(partial(slow_copy, torch.full((size,), float(value), device=device)))
        # The caller's stream would take the memory of what it no longer holds.
        others = [torch.zeros(size, device=device) for _ in range(4)]
        copied, _ = wait()
        assert bool((copied == value).all()) and not any(bool(other.any()) for other in others)


def mixed_steps() -> list[StepPlan]:
    """A picture's prompt and two texts; then, beside single tokens, a text that the cut falls into."""
    texts = [tuple(100 + 7 * slot + i for i in range(12)) for slot in range(4)]
    new = [NewSequence(0, PROMPT, len(PROMPT), IMAGE, SamplingRow())]
    new += [NewSequence(slot, texts[slot], 12, (), SamplingRow()) for slot in (1, 2)]
    late = NewSequence(3, texts[3], 12, (), SamplingRow())
    return [
        StepPlan(
            0,
            new=tuple(new),
            encode=("x",),
            # 15 + 12 + 5 tokens: the cut falls behind the last of the picture's that are computed here.
            slices=(Slice(0, 0, 15, (0,), False), Slice(1, 0, 12, (2,), True), Slice(2, 0, 5, (3,), False)),
        ),
        StepPlan(
            1,
            new=(late,),
            slices=(Slice(1, 12, 1, (), True), Slice(3, 0, 12, (4,), True), Slice(0, 15, 4, (1,), True),
                    Slice(2, 5, 7, (), True)),
        ),
        StepPlan(2, slices=tuple(Slice(slot, at, 1, (), True) for slot, at in ((0, 19), (1, 13), (2, 12), (3, 12)))),
    ]  # fmt: skip


def answers(runner: Runner) -> tuple[list[dict[int, tuple[int, ...]]], list[int]]:
    """Tokens of each step by slot, and how many collectives it took."""
    assert runner.load().num_blocks
    runner.allocate(8)
    runner.stage("x", "pixel_values", pixels(0))
    results = [runner.launch(plan).result() for plan in mixed_steps()]
    return [tokens_by_slot(result) for result in results], [result.counters.num_collectives for result in results]


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_ranks_in_halves_give_the_tokens_of_one_rank(world_size: int, tiny_checkpoint: Path) -> None:
    with torch.inference_mode():
        expected, _ = answers(Runner(rank_config(tiny_checkpoint), single_rank()))

    def on(least: int | None) -> list[Any]:
        comms = thread_comms(world_size)
        changes = {"world_size": world_size, "halve_step_tokens": least}
        return on_ranks(
            comms, lambda rank: answers(Runner(rank_config(tiny_checkpoint, rank=rank, **changes), comms[rank]))
        )

    whole, halved = on(None), on(20)
    assert [tokens for tokens, _ in whole] == [tokens for tokens, _ in halved] == [expected] * world_size
    (_, counts), (_, halved_counts) = whole[0], halved[0]
    # Two layers have five sums; a half without a sampled token leaves out the last.
    assert [half - plain for half, plain in zip(halved_counts, counts, strict=True)] == [4, 5, 0]
