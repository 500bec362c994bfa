from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels.embed import embed_reference
from dist_vlm.kernels.embed_triton import embed_triton

from .embed_cases import check_edges, check_feature_rows_outside, check_shards_add_up, random_rows, wrong_calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab", "hidden"), [(24, 8), (25, 1), (13, 769), (5, 1024), (7, 2056)])
def test_shards_add_up_to_the_whole(vocab, hidden, dtype, device) -> None:
    check_shards_add_up(embed_triton, vocab, hidden, dtype, device)


def test_ids_at_the_edges_of_a_shard(device) -> None:
    check_edges(embed_triton, device)


def test_feature_rows_outside_the_features(device) -> None:
    check_feature_rows_outside(embed_triton, device)


@pytest.mark.parametrize(("num_tokens", "hidden"), [(0, 3), (4, 0)])
def test_nothing_to_write(num_tokens, hidden, device) -> None:
    ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    table, features = torch.zeros(2, hidden, device=device), torch.zeros(1, hidden, device=device)
    assert embed_triton(ids, table, feature_rows=ids, features=features).shape == (num_tokens, hidden)


def test_rows_that_begin_anywhere_in_memory(device) -> None:
    """Ids, rows and features that are parts of greater tensors, as a step's are."""
    tokens = torch.tensor([[0, 1, 2, 0, 1, 2, 1], [-1, 0, -1, 2, -1, 1, -1]], device=device)
    table, features = random_rows(3, 24, torch.float16, seed=1), random_rows(4, 24, torch.float16, seed=2)
    wide = random_rows(1, 97, torch.float16, seed=3).flatten().to(device)
    table, features = table.to(device), wide[1:].view(4, 24).copy_(features.to(device))
    for start in range(7):
        ids, rows = tokens[0, start:], tokens[1, start:]
        expected = embed_reference(ids, table, feature_rows=rows, features=features)
        assert torch.equal(embed_triton(ids, table, feature_rows=rows, features=features), expected)


@pytest.mark.parametrize(("changed", "error", "message"), wrong_calls())
def test_wrong_arguments_are_named(changed, error, message, device) -> None:
    arguments = {
        "ids": torch.zeros(4, dtype=torch.int64),
        "table": torch.zeros(2, 3),
        "feature_rows": torch.zeros(4, dtype=torch.int64),
        "features": torch.zeros(2, 3),
        **changed,
    }
    arguments = {name: tensor.to(device) for name, tensor in arguments.items()}
    ids, table = arguments.pop("ids"), arguments.pop("table")
    with pytest.raises(error, match=f"^embed: {message}"):
        embed_triton(ids, table, **arguments)


def test_a_dtype_that_it_does_not_take_is_refused(device) -> None:
    with pytest.raises(TypeError, match="embed: table has dtype torch.float64, must be one of"):
        embed_triton(torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(2, 3, device=device).double())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_torch_at_the_size_of_a_7b_model(dtype, device) -> None:
    """Both halves of a vocabulary, and the whole; 620 tokens, an image among them."""
    whole, features = (
        random_rows(32064, 4096, dtype, seed=1).to(device),
        random_rows(576, 4096, dtype, seed=2).to(device),
    )
    ids = torch.randint(0, 32064, (620,), generator=torch.Generator().manual_seed(3)).to(device)
    rows = torch.full_like(ids, -1)
    rows[7 : 7 + 576] = torch.arange(576, device=device)
    expected = whole[ids]
    expected[7 : 7 + 576] = features
    first, second = whole.split(16032)
    parts = (
        embed_triton(ids, first, feature_rows=rows, features=features),
        embed_triton(ids, second, first=16032, feature_rows=rows),
    )
    assert torch.equal(parts[0] + parts[1], expected)
    assert torch.equal(embed_triton(ids, whole, feature_rows=rows, features=features), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("has_image", [False, True])
def test_runs_in_a_graph(has_image, device, replay) -> None:
    table, features = (random_rows(count, 4096, torch.bfloat16, seed=count).to(device) for count in (50, 9))
    ids = torch.tensor([3, 49, 50, -1, 7], device=device)
    given = {"feature_rows": torch.tensor([-1, 8, -1, 0, 9], device=device), "features": features} if has_image else {}
    actual = replay(lambda: embed_triton(ids, table, **given))
    assert torch.equal(actual, embed_reference(ids, table, **given))
