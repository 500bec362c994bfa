from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from dist_vlm.kernels.penalties import penalise_generated, penalise_repetition

VOCAB = 13


def case(seed: int, num_slots: int = 4, length: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, VOCAB, (num_slots, length), generator=generator)
    return torch.randn(num_slots + 1, VOCAB, generator=generator), token_ids


@pytest.mark.parametrize("seed", range(5))
def test_repetition_equals_transformers_row_by_row(seed: int) -> None:
    logits, token_ids = case(seed)
    logits[1, token_ids[3, 0]] = -torch.inf
    rows, slots, ends, penalties = [4, 1, 0], [0, 3, 1], [10, 1, 6], [1.3, 0.7, 2.0]
    expected = logits.clone()
    for row, slot, end, penalty in zip(rows, slots, ends, penalties, strict=True):
        processor = RepetitionPenaltyLogitsProcessor(penalty)
        expected[row] = processor(token_ids[slot : slot + 1, :end], logits[row : row + 1])[0]
    penalise_repetition(
        logits,
        token_ids,
        rows=torch.tensor(rows),
        slots=torch.tensor(slots),
        ends=torch.tensor(ends),
        longest=10,
        penalty=torch.tensor(penalties),
    )
    assert torch.equal(logits, expected)


def test_repetition_leaves_every_logit_finite() -> None:
    logits = torch.tensor([[5.0, 0.0, -5.0]])
    one = torch.ones(1, dtype=torch.int64)
    penalise_repetition(
        logits,
        torch.tensor([[0, 1, 2]]),
        rows=one - 1,
        slots=one - 1,
        ends=one * 3,
        longest=3,
        penalty=torch.tensor([torch.finfo(torch.float32).tiny]),
    )
    assert logits.isfinite().all()
    assert logits.argmax().item() == 0


@pytest.mark.parametrize("seed", range(5))
def test_presence_and_frequency_follow_the_formula(seed: int) -> None:
    logits, token_ids = case(seed)
    # (row, slot, begin, end, presence, frequency)
    asked = [(3, 1, 2, 10, 0.5, 0.25), (0, 0, 9, 10, -1.5, 0.0), (2, 3, 0, 7, 0.0, 2.0)]
    expected = logits.to(torch.float64)
    for row, slot, begin, end, presence, frequency in asked:
        for token, count in Counter(token_ids[slot, begin:end].tolist()).items():
            expected[row, token] -= presence + frequency * count
    columns = list(zip(*asked, strict=True))
    rows, slots, begins, ends = (torch.tensor(column) for column in columns[:4])
    untouched = [1, 4]
    before = logits[untouched].clone()
    penalise_generated(
        logits,
        token_ids,
        rows=rows,
        slots=slots,
        begins=begins,
        ends=ends,
        longest=8,
        presence=torch.tensor(columns[4]),
        frequency=torch.tensor(columns[5]),
    )
    torch.testing.assert_close(logits.to(torch.float64), expected, rtol=0, atol=1e-5)
    assert torch.equal(logits[untouched], before)


def test_wrong_arguments_are_refused() -> None:
    one = torch.ones(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"penalise_repetition: penalty has shape \[2\], must be \[1\]"):
        penalise_repetition(
            torch.zeros(2, 3), one[None], rows=one, slots=one, ends=one, longest=1, penalty=torch.ones(2)
        )
    with pytest.raises(TypeError, match=r"penalise_generated: ends has dtype torch.float32"):
        penalise_generated(
            torch.zeros(2, 3),
            one[None],
            rows=one,
            slots=one,
            begins=one,
            ends=torch.ones(1),
            longest=1,
            presence=torch.ones(1),
            frequency=torch.ones(1),
        )
