from __future__ import annotations

import math

import pytest
import torch

from dist_vlm.kernels.greedy_triton import greedy_triton
from dist_vlm.kernels.sample import greedy


def brute_force(logits):
    """The lowest id of the highest logit, and whether all are finite, a row of Python floats at a time."""
    rows = [row.tolist() for row in logits.float().cpu()]
    tokens = [max(range(len(row)), key=lambda v, row=row: (row[v], -v)) for row in rows]
    return tokens, [all(map(math.isfinite, row)) for row in rows]


def check(logits) -> None:
    tokens, finite = greedy_triton(logits)
    expected_tokens, expected_finite = brute_force(logits)
    assert (tokens.dtype, finite.dtype) == (torch.int64, torch.bool)
    assert tokens.tolist() == expected_tokens
    assert finite.tolist() == expected_finite
    assert torch.equal(tokens, greedy(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_rows", "vocab"), [(0, 8), (1, 1), (5, 2), (3, 769), (2, 8192), (3, 8193), (2, 32064), (1, 50257)]
)
def test_equals_brute_force(num_rows, vocab, dtype, device) -> None:
    check(torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(vocab)).to(device, dtype))


@pytest.mark.parametrize("vocab", [3, 1000, 20_011])
def test_the_lowest_id_among_equals(vocab, device) -> None:
    """Few values, so that the highest is there many times, in every lane and every turn of the loop."""
    generator = torch.Generator().manual_seed(1)
    check(torch.randint(-2, 2, (4, vocab), generator=generator).float().to(device))
    logits = torch.full((3, vocab), -1.0)
    for row, places in enumerate(((vocab - 1,), (vocab - 2, vocab - 1), (1, vocab - 1))):
        logits[row, list(places)] = 2.5
    check(logits.to(device))
    check(torch.tensor([0.0, -0.0, 0.0]).repeat(2, 1).to(device))


def test_strided_rows(device) -> None:
    wide = torch.randn(6, 700, generator=torch.Generator().manual_seed(3)).to(device)
    wide[:, :5], wide[:, 600:] = 100.0, 100.0
    check(wide[::2, 5:600])
    check(wide[:1, 5:600].expand(3, 595))


@pytest.mark.parametrize("vocab", [5, 9000])
def test_infinite_logits_are_told(vocab, device) -> None:
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(4))
    logits[0, vocab - 1] = torch.inf
    logits[1, 2] = -torch.inf
    logits[2] = -torch.inf
    check(logits.to(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 5, 9000])
def test_a_row_with_nan_is_told_and_its_token_is_of_the_vocabulary(vocab, dtype, device) -> None:
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(5)).to(dtype)
    logits[0, vocab - 1] = torch.nan
    logits[1] = torch.nan
    logits[2, 0] = -torch.nan
    tokens, finite = greedy_triton(logits.to(device))
    assert finite.tolist() == [False, False, False, True]
    assert all(0 <= token < vocab for token in tokens.tolist())
    assert tokens[3] == brute_force(logits[3:])[0][0]


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (torch.zeros(3), ValueError, "greedy: logits has shape"),
        (torch.zeros(2, 0), ValueError, "must have at least one column"),
        (torch.zeros(4, 6).T, ValueError, "its last axis must be dense"),
        (torch.zeros(2, 3, dtype=torch.float64), TypeError, "logits has dtype torch.float64, must be one of"),
    ],
)
def test_wrong_arguments_are_named(logits, error, message, device) -> None:
    with pytest.raises(error, match=message):
        greedy_triton(logits.to(device))


@pytest.mark.gpu
def test_runs_in_a_graph(device, replay) -> None:
    logits = torch.randn(5, 32064, device=device)
    tokens, finite = replay(lambda: greedy_triton(logits))
    assert torch.equal(tokens, greedy(logits))
    assert finite.all()
