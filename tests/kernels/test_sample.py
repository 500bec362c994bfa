import pytest
import torch
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from dist_vlm.kernels import sample


def params(rows, **values):
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, "sample_index": 0, "position": 0}
    dtypes = {"temperature": torch.float32, "top_p": torch.float32}
    return {
        name: torch.as_tensor(values.get(name, default), dtype=dtypes.get(name, torch.int64)).expand(rows).contiguous()
        for name, default in defaults.items()
    }


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [5.0, 5.0, 5.0, 5.0], [-1.0, -2.0, -3.0, -0.5]])
    assert sample.greedy(logits).tolist() == [1, 0, 3]


@pytest.mark.parametrize("k", [1, 2, 7, 100])
def test_top_k_keeps_what_transformers_keeps(k):
    logits = torch.randn(5, 33, generator=torch.Generator().manual_seed(k)).round(decimals=1)
    expected = TopKLogitsWarper(k)(None, logits)
    assert torch.equal(sample.cut_top_k(logits, torch.full((5,), k)), expected)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(p):
    logits = torch.randn(6, 57, generator=torch.Generator().manual_seed(1)) * 3
    expected = TopPLogitsWarper(p)(None, logits)
    assert torch.equal(sample.cut_top_p(logits, torch.full((6,), p)).isinf(), expected.isinf())


def test_each_row_has_its_own_cuts():
    logits = torch.arange(8.0).expand(3, 8)
    kept = sample.cut_top_k(logits, torch.tensor([0, 2, 1])).isfinite().sum(1)
    assert kept.tolist() == [8, 2, 1]
    kept = sample.cut_top_p(logits, torch.tensor([1.0, 0.5, 0.8])).isfinite().sum(1)
    assert kept.tolist() == [8, 1, 2]


def test_draws_follow_the_softmax():
    rows = 40_000
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5])
    tokens = sample.draw(logits.expand(rows, 5), **params(rows, temperature=0.8, position=torch.arange(rows)))
    expected = (logits / 0.8).softmax(0) * rows
    counts = torch.bincount(tokens, minlength=5)
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    # 4 degrees of freedom: above 23.5 once in 10^4; the seed is fixed.
    assert chi_square < 23.5


def test_draws_stay_inside_the_cuts():
    rows = 500
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(3)).expand(rows, 50)
    tokens = sample.draw(logits, **params(rows, top_k=3, position=torch.arange(rows)))
    assert set(tokens.tolist()) == set(logits[0].topk(3).indices.tolist())
    nucleus = TopPLogitsWarper(0.4)(None, logits[:1])[0].isfinite().nonzero().flatten().tolist()
    tokens = sample.draw(logits, **params(rows, top_p=0.4, position=torch.arange(rows)))
    assert set(tokens.tolist()) == set(nucleus)


def test_a_draw_depends_on_seed_index_and_position_only():
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(5))
    keys = {"seed": torch.tensor([7, 7, 7, 8]), "sample_index": torch.tensor([0, 1, 0, 0])}
    keys["position"] = torch.tensor([3, 3, 4, 3])
    same = sample.draw(
        logits[:1].expand(4, -1),
        temperature=torch.ones(4),
        top_p=torch.ones(4),
        top_k=torch.zeros(4, dtype=torch.int64),
        **keys,
    )
    assert len(set(same.tolist())) == 4
    for i in range(4):
        alone = sample.draw(logits[:1], **params(1, **{name: value[i] for name, value in keys.items()}))
        assert alone.item() == same[i].item()
