from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels import logprobs
from dist_vlm.kernels.logprobs import compute_logprobs


@pytest.mark.parametrize(("rows", "vocab", "num_top"), [(1, 1, 1), (3, 7, 0), (5, 769, 20), (2, 5, 9)])
def test_values_equal_a_float64_softmax(rows: int, vocab: int, num_top: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, vocab, generator=generator) * 8
    token_ids = torch.randint(0, vocab, (rows,), generator=generator)
    found = compute_logprobs(logits, token_ids, num_top=num_top)
    exact = logits.to(torch.float64).log_softmax(-1)
    kept = min(num_top, vocab)
    best = exact.topk(kept, dim=-1)
    torch.testing.assert_close(found.logprob.to(torch.float64), exact[torch.arange(rows), token_ids], rtol=0, atol=5e-6)
    assert found.top_ids.tolist() == best.indices.tolist()
    torch.testing.assert_close(found.top_logprobs.to(torch.float64), best.values, rtol=0, atol=5e-6)
    for row in range(rows):
        higher = sum(value > logits[row, token_ids[row]].item() for value in logits[row].tolist())
        assert found.rank[row].item() == 1 + higher


def test_among_equals_the_lower_id_comes_first_and_ranks_are_shared() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randint(-3, 4, (6, 50), generator=generator).to(torch.float32)
    logits[0] = 0.0
    logits[0, 1::2] = -0.0
    token_ids = torch.arange(6)
    found = compute_logprobs(logits, token_ids, num_top=20)
    for row, values in enumerate(logits.tolist()):
        order = sorted(range(50), key=lambda token, values=values: (-values[token], token))
        assert found.top_ids[row].tolist() == order[:20]
        assert found.rank[row].item() == 1 + sum(value > values[row] for value in values)


def test_infinities_and_denormals_are_ordered_too() -> None:
    logits = torch.tensor([[-torch.inf, 1e-40, -1e-40, 3e38, 0.0, -3e38]])
    found = compute_logprobs(logits, torch.tensor([4]), num_top=6)
    assert found.top_ids.tolist() == [[3, 1, 4, 2, 5, 0]]


def test_many_rows_are_looked_at_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    logits, token_ids = torch.randn(7, 30, generator=generator), torch.randint(0, 30, (7,), generator=generator)
    whole = compute_logprobs(logits, token_ids, num_top=3)
    monkeypatch.setattr(logprobs, "_PART_LOGITS", 60)
    for one, other in zip(whole, compute_logprobs(logits, token_ids, num_top=3), strict=True):
        assert torch.equal(one, other)


def test_no_rows_give_no_entries() -> None:
    found = compute_logprobs(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), num_top=2)
    assert [tuple(tensor.shape) for tensor in found] == [(0,), (0,), (0, 2), (0, 2)]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"compute_logprobs: token_ids has shape \[3\], must be \[2\]"):
        compute_logprobs(torch.zeros(2, 5), torch.zeros(3, dtype=torch.int64), num_top=0)
    with pytest.raises(TypeError, match=r"logits has dtype torch.bfloat16"):
        compute_logprobs(torch.zeros(2, 5).bfloat16(), torch.zeros(2, dtype=torch.int64), num_top=0)
