from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper

from dist_vlm.kernels import sample
from dist_vlm.kernels.sample import DrawRow

# Above the 1 - 10^-4 quantile of chi-square, by degrees of freedom; seeds are fixed, so a test passes always or never.
CHI_SQUARE = {1: 15.2, 2: 18.5, 3: 21.2, 4: 23.6, 5: 25.8, 6: 27.9, 7: 29.9, 8: 31.9, 9: 33.8}


def random_logits(rows: int, vocab: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def chi_square(logits: Tensor, row: DrawRow, expected: Tensor) -> tuple[float, int]:
    """Of 15,000 draws of `row` at positions of their own against probabilities; (statistic, degrees of freedom)."""
    count = 15_000
    tokens = sample.draw(logits.expand(count, -1), [row._replace(position=i) for i in range(count)])
    counts = torch.bincount(tokens, minlength=logits.shape[0]).to(torch.float64)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    wanted = expected[possible] * count
    return ((counts[possible] - wanted) ** 2 / wanted).sum().item(), int(possible.sum()) - 1


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [5.0, 5.0, 5.0, 5.0], [-1.0, -2.0, -3.0, -0.5]])
    assert sample.greedy(logits).tolist() == [1, 0, 3]
    assert sample.greedy(torch.tensor([[torch.nan, 1.0, 2.0]])).item() in (0, 1, 2)


@pytest.mark.parametrize("k", [1, 2, 7, 33])
def test_top_k_keeps_what_transformers_keeps(k: int) -> None:
    logits = random_logits(5, 33, seed=k).round(decimals=1)
    assert torch.equal(sample.cut_top_k(logits, torch.full((5,), k), most=k), TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [0.0, 0.01, 0.3, 0.9, 1.0])
def test_min_p_keeps_what_transformers_keeps(p: float) -> None:
    logits = random_logits(6, 57)
    assert torch.equal(sample.cut_min_p(logits, torch.full((6,), p)), MinPLogitsWarper(p)(None, logits))


def test_each_row_has_its_own_cuts() -> None:
    logits = torch.arange(8.0).expand(3, 8)
    assert sample.cut_top_k(logits, torch.tensor([8, 2, 1]), most=8).isfinite().sum(1).tolist() == [8, 2, 1]
    min_p = torch.tensor([0.0, 1.0, 0.1])
    assert sample.cut_min_p(logits, min_p).isfinite().sum(1).tolist() == [8, 1, 3]


def exact(logits: Tensor, temperature: float) -> Tensor:
    return (logits.to(torch.float64) / temperature).softmax(0)


def without(probabilities: Tensor, dropped: Tensor) -> Tensor:
    kept = probabilities.masked_fill(dropped, 0.0)
    return kept / kept.sum()


def nucleus_complement(probabilities: Tensor, p: float) -> Tensor:
    """Tokens outside the smallest set with mass >= p, one by one."""
    dropped, mass = torch.ones_like(probabilities, dtype=torch.bool), 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if mass >= p:
            break
        dropped[token], mass = False, mass + probabilities[token].item()
    return dropped


CUTS: dict[str, tuple[DrawRow, Callable[[Tensor], Tensor]]] = {
    "none": (DrawRow(0.8), lambda p: torch.zeros_like(p, dtype=torch.bool)),
    "top_k": (DrawRow(1.3, top_k=4), lambda p: p < p.topk(4).values[-1]),
    "top_p": (DrawRow(1.3, top_p=0.8), lambda p: nucleus_complement(p, 0.8)),
    "min_p": (DrawRow(1.3, min_p=0.12), lambda p: p < 0.12 * p.max()),
}


@pytest.mark.parametrize("name", CUTS)
def test_draws_follow_the_softmax_of_what_is_kept(name: str) -> None:
    row, dropped = CUTS[name]
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, 1.5, -0.5, 0.25])
    probabilities = exact(logits, row.temperature)
    expected = without(probabilities, dropped(probabilities))
    assert name == "none" or (expected == 0).any()
    statistic, freedom = chi_square(logits, row._replace(seed=5), expected)
    assert statistic < CHI_SQUARE[freedom]


def test_cuts_are_made_in_their_order() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, 1.5, -0.5, 0.25])
    row = DrawRow(1.5, top_k=6, top_p=0.85, min_p=0.35)
    probabilities = exact(logits, 1.5)
    probabilities = without(probabilities, probabilities < probabilities.topk(6).values[-1])
    probabilities = without(probabilities, nucleus_complement(probabilities, 0.85))
    assert (probabilities > 0).sum() == 5
    probabilities = without(probabilities, probabilities < 0.35 * probabilities.max())
    assert (probabilities > 0).sum() == 4
    statistic, freedom = chi_square(logits, row, probabilities)
    assert statistic < CHI_SQUARE[freedom]


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.tensor([0.0, -torch.inf, 1.0, -torch.inf, 0.5])
    for row in (DrawRow(1.0), DrawRow(1e300), DrawRow(1.0, top_k=4, top_p=0.99, min_p=0.01)):
        statistic, freedom = chi_square(logits, row, exact(logits, min(row.temperature, 1e30)))
        assert statistic < CHI_SQUARE[freedom]


def test_the_least_temperature_is_greedy() -> None:
    logits = random_logits(20, 100)
    tokens = sample.draw(logits, [DrawRow(1e-300, position=i, top_p=0.5, min_p=0.1) for i in range(20)])
    assert tokens.tolist() == logits.argmax(-1).tolist()


def test_a_draw_depends_on_seed_index_and_position_only() -> None:
    logits = random_logits(1, 1000, seed=5) / 3
    rows = [
        DrawRow(1.0, seed=seed, sample_index=index, position=position)
        for seed, index, position in [(7, 0, 3), (7, 1, 3), (7, 0, 4), (8, 0, 3)]
    ]
    together = sample.draw(logits.expand(4, -1), rows).tolist()
    assert len(set(together)) == 4
    assert [sample.draw(logits, [row]).item() for row in rows] == together


def mixed_rows(count: int) -> list[DrawRow]:
    """Rows of every combination of cuts."""
    return [
        DrawRow(
            0.7 + i / count,
            top_k=(0, 5, 40)[i % 3],
            top_p=(1.0, 0.9)[i // 3 % 2],
            min_p=(0.0, 0.05)[i // 6 % 2],
            seed=i,
            position=100 + i,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("vocab", [257, 3001])
def test_a_row_alone_draws_what_it_draws_among_others(vocab: int) -> None:
    logits, rows = random_logits(24, vocab), mixed_rows(24)
    together = sample.draw(logits, rows).tolist()
    assert [sample.draw(logits[i : i + 1], [rows[i]]).item() for i in range(24)] == together


def test_large_batches_are_drawn_in_parts_with_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, rows = random_logits(25, 101), mixed_rows(25)
    whole = sample.draw(logits, rows)
    monkeypatch.setitem(sample._PART_LOGITS, "cpu", 400)
    assert torch.equal(sample.draw(logits, rows), whole)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [257, 32003])
def test_a_row_alone_draws_what_it_draws_among_others_on_a_gpu(vocab: int) -> None:
    logits, rows = random_logits(24, vocab).cuda(), mixed_rows(24)
    together = sample.draw(logits, rows).tolist()
    assert [sample.draw(logits[i : i + 1], [rows[i]]).item() for i in range(24)] == together


@pytest.mark.gpu
def test_cuts_on_a_gpu_keep_what_they_keep_on_a_cpu() -> None:
    logits = random_logits(5, 32003).round(decimals=1)
    top_k = torch.tensor([1, 5, 50, 500, 32003])
    kept = sample.cut_top_k(logits.cuda(), top_k.cuda(), most=32003).isfinite().cpu()
    assert torch.equal(kept, sample.cut_top_k(logits, top_k, most=32003).isfinite())
    assert sample.greedy(logits.cuda()).tolist() == sample.greedy(logits).tolist()
