"""Penalties, by torch's operations and by Triton's kernel, against transformers' processor and the formula."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from dist_vlm.kernels.penalties import PenaltyRow, penalise
from dist_vlm.kernels.penalties_triton import penalise_triton

VOCAB = 13
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def by_triton(logits: Tensor, token_ids: Tensor, rows: Sequence[PenaltyRow]) -> None:
    held = logits.to(TRITON_DEVICE)
    penalise_triton(held, token_ids.to(TRITON_DEVICE), rows)
    logits.copy_(held)


OPS = pytest.mark.parametrize("op", [penalise, by_triton])
Op = Callable[[Tensor, Tensor, Sequence[PenaltyRow]], None]


def case(seed: int, *, num_slots: int = 4, length: int = 10, vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, vocab, (num_slots, length), generator=generator)
    return torch.randn(num_slots + 1, vocab, generator=generator), token_ids


def expected_of(logits: Tensor, token_ids: Tensor, rows: Sequence[PenaltyRow]) -> Tensor:
    """One row after another, in float64."""
    expected = logits.to(torch.float64)
    for row in rows:
        known = token_ids[row.slot : row.slot + 1, : row.end]
        processor = RepetitionPenaltyLogitsProcessor(float(row.repetition))
        expected[row.row] = processor(known, expected[row.row : row.row + 1])[0]
        for token, count in Counter(known[0, row.begin :].tolist()).items():
            expected[row.row, token] -= row.presence + row.frequency * count
    return expected


@OPS
@pytest.mark.parametrize("seed", range(5))
def test_repetition_equals_transformers_row_by_row(op: Op, seed: int) -> None:
    logits, token_ids = case(seed)
    logits[1, token_ids[3, 0]] = -torch.inf
    rows = [PenaltyRow(4, 0, 5, 10, 1.3), PenaltyRow(1, 3, 1, 1, 0.7), PenaltyRow(0, 1, 0, 6, 2.0)]
    expected = logits.clone()
    for row in rows:
        processor = RepetitionPenaltyLogitsProcessor(row.repetition)
        expected[row.row] = processor(token_ids[row.slot, : row.end][None], logits[row.row : row.row + 1])[0]
    op(logits, token_ids, rows)
    assert torch.equal(logits, expected), "to the bit"


@OPS
def test_repetition_leaves_every_logit_finite(op: Op) -> None:
    logits = torch.tensor([[5.0, 0.0, -5.0]])
    op(logits, torch.tensor([[0, 1, 2]]), [PenaltyRow(0, 0, 3, 3, repetition=1e-60)])
    assert logits.isfinite().all()
    assert logits.argmax().item() == 0


@OPS
@pytest.mark.parametrize("seed", range(5))
def test_presence_and_frequency_follow_the_formula(op: Op, seed: int) -> None:
    logits, token_ids = case(seed)
    rows = [
        PenaltyRow(3, 1, 2, 10, presence=0.5, frequency=0.25),
        PenaltyRow(0, 0, 9, 10, presence=-1.5),
        PenaltyRow(2, 3, 0, 7, frequency=2.0),
        PenaltyRow(4, 2, 5, 5, presence=9.0, frequency=9.0),  # nothing is generated yet
    ]
    expected, before = expected_of(logits, token_ids, rows), logits.clone()
    op(logits, token_ids, rows)
    torch.testing.assert_close(logits.to(torch.float64), expected, rtol=0, atol=1e-5)
    assert torch.equal(logits[[1, 4]], before[[1, 4]])


@OPS
def test_all_at_once_over_several_tiles_of_tokens(op: Op) -> None:
    """Tokens that come some hundred times, in the prompt and after it, among and across the tiles."""
    logits, token_ids = case(1, num_slots=3, length=3000, vocab=37)
    token_ids[1] = 5
    rows = [
        PenaltyRow(1, 0, 1500, 3000, 1.2, 0.3, 0.01),
        PenaltyRow(3, 1, 1024, 2048, 0.8, -0.3, 0.02),
        PenaltyRow(0, 2, 2999, 3000, 1.0, 2.0, 0.5),
    ]
    expected = expected_of(logits, token_ids, rows)
    op(logits, token_ids, rows)
    torch.testing.assert_close(logits.to(torch.float64), expected, rtol=1e-6, atol=1e-5)


penalties = st.sampled_from([0.0, 0.0, 0.5, -0.25, 2.0])
asked = st.tuples(
    st.integers(0, 6), st.integers(0, 6), st.sampled_from([1.0, 1.0, 0.5, 1.3]), penalties, penalties, st.integers(0, 3)
)


@settings(max_examples=60)
@given(st.lists(asked, min_size=1, max_size=4), st.integers(0, 1000))
@example([(0, 1, 1.0, 0.0, 0.0, 0)], 0)  # a row that asks nothing
def test_triton_and_torch_agree_whatever_is_asked(cases: list, seed: int) -> None:
    logits, token_ids = case(seed, length=13)
    rows = [
        PenaltyRow(row, slot, prompt + 1 - (generated > 0), prompt + generated + 1, *numbers)
        for row, (prompt, generated, *numbers, slot) in enumerate(cases)
    ]
    expected, found, by_torch = expected_of(logits, token_ids, rows), logits.clone(), logits.clone()
    by_triton(found, token_ids, rows)
    penalise(by_torch, token_ids, rows)
    torch.testing.assert_close(found, by_torch, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.to(torch.float64), expected, rtol=1e-6, atol=1e-5)


def test_rows_of_wider_tensors_and_ids_beyond_the_vocabulary() -> None:
    wide, ids = torch.randn(3, 40, device=TRITON_DEVICE), torch.full((2, 20), 99, device=TRITON_DEVICE)
    ids[1, :3] = torch.tensor([4, -1, 4], device=TRITON_DEVICE)
    before = wide.clone()
    penalise_triton(wide[:, 10:23], ids[:, :9], [PenaltyRow(2, 1, 0, 9, presence=1.0, frequency=0.5)])
    before[2, 14] -= 2.0
    torch.testing.assert_close(wide, before)


@OPS
def test_nothing_asked_changes_nothing(op: Op) -> None:
    logits, token_ids = case(0)
    before = logits.clone()
    op(logits, token_ids, [])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("op", [penalise, penalise_triton])
def test_wrong_arguments_are_refused(op: Op) -> None:
    ids = torch.ones((1, 1), dtype=torch.int64)
    with pytest.raises(TypeError, match=r"penalise: logits has dtype torch.float16"):
        op(torch.zeros(2, 3, dtype=torch.float16), ids, [])
    with pytest.raises(TypeError, match=r"penalise: token_ids has dtype torch.int32"):
        op(torch.zeros(2, 3), ids.int(), [])
    with pytest.raises(ValueError, match=r"penalise: logits has shape \[3\]"):
        op(torch.zeros(3), ids, [])
    with pytest.raises(ValueError, match=r"penalise: token_ids has shape \[1\]"):
        op(torch.zeros(2, 3), ids[0], [])
