from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import TopPLogitsWarper

from dist_vlm.kernels.top_p import cut_top_p, cut_top_p_by_bins, cut_top_p_reference


def same(p: float, rows: int) -> Tensor:
    return torch.full((rows,), p, dtype=torch.float64)


def cases(vocab: int, seed: int = 0) -> Tensor:
    """Rows that are wide, flat, steep, full of equals, and cut already."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(6, vocab, generator=generator)
    rows = [noise[0] * 3, noise[1] * 1e-4 + 50, noise[2] * 40, noise[3].round(), noise[4] * 0 - 7]
    cut = torch.where(noise[5] < noise[5].median(), -torch.inf, noise[5])
    return torch.stack([*rows, cut])


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_what_transformers_keeps_is_kept(p: float) -> None:
    logits = torch.randn(6, 57, generator=torch.Generator().manual_seed(1)) * 3
    expected = TopPLogitsWarper(p)(None, logits)
    assert torch.equal(cut_top_p(logits, same(p, 6)), expected)
    assert torch.equal(cut_top_p_reference(logits, same(p, 6)), expected)


@pytest.mark.parametrize("vocab", [1, 2, 769, 5125])
@pytest.mark.parametrize("p", [1e-300, 0.1, 0.5, 0.95, 0.99999, 1.0])
def test_bins_keep_what_sorting_keeps(vocab: int, p: float) -> None:
    logits = cases(vocab)
    assert torch.equal(cut_top_p_by_bins(logits, same(p, 6)), cut_top_p_reference(logits, same(p, 6)))


def test_lower_ids_come_first_among_equals() -> None:
    logits = torch.tensor([[0.0] * 10, [-1.0, 3.0, -1.0, 3.0, 3.0, -1.0, -1.0, -1.0, -1.0, -1.0]])
    kept = [row.nonzero().flatten().tolist() for row in cut_top_p(logits, same(0.35, 2)).isfinite()]
    assert kept == [[0, 1, 2, 3], [1, 3]]


def test_each_row_has_its_own_p_and_its_own_bits_in_any_batch() -> None:
    logits = torch.arange(8.0).expand(3, 8)
    top_p = torch.tensor([1.0, 0.5, 0.8], dtype=torch.float64)
    assert cut_top_p(logits, top_p).isfinite().sum(1).tolist() == [8, 1, 2]
    logits, top_p = cases(1001), torch.linspace(0.2, 0.9, 6, dtype=torch.float64)
    together = cut_top_p(logits, top_p)
    for i in range(6):
        assert torch.equal(cut_top_p(logits[i : i + 1], top_p[i : i + 1])[0], together[i])


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_of_numbers_changes_no_other(value: float) -> None:
    logits = cases(101)
    expected = cut_top_p(logits, same(0.7, 6))
    broken = logits.clone()
    broken[2] = value
    broken[4, 3:90] = value
    found = cut_top_p(broken, same(0.7, 6))
    kept = [0, 1, 3, 5]
    assert torch.equal(found[kept], expected[kept])


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"cut_top_p: top_p has dtype torch.float32"):
        cut_top_p(torch.zeros(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match=r"cut_top_p: top_p has shape \[3\], must be \[2\]"):
        cut_top_p(torch.zeros(2, 3), same(0.5, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("cut", [cut_top_p, cut_top_p_by_bins])
def test_on_a_gpu_rows_keep_what_they_keep_alone(cut: Callable[[Tensor, Tensor], Tensor]) -> None:
    logits = cases(32003).cuda()
    for p in (0.1, 0.5, 0.9, 0.999):
        expected = torch.cat([cut_top_p_reference(row[None], same(p, 1).cuda()) for row in logits])
        assert torch.equal(cut(logits, same(p, 6).cuda()), expected)
    cut(torch.full((2, 501), torch.nan, device="cuda"), same(0.5, 2).cuda())
    torch.cuda.synchronize()
