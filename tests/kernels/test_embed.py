from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels.embed import embed_reference, embed_torch

from .embed_cases import check_edges, check_feature_rows_outside, check_shards_add_up, random_rows, wrong_calls

CPU = torch.device("cpu")
FUNCTIONS = [embed_reference, embed_torch]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab", "hidden"), [(24, 8), (25, 1), (13, 769)])
def test_shards_add_up_to_the_whole(vocab, hidden, dtype, function) -> None:
    check_shards_add_up(function, vocab, hidden, dtype, CPU)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_ids_at_the_edges_of_a_shard(function) -> None:
    check_edges(function, CPU)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_feature_rows_outside_the_features(function) -> None:
    check_feature_rows_outside(function, CPU)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_tokens(function) -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert function(none, torch.zeros(2, 3), feature_rows=none, features=torch.zeros(1, 3)).shape == (0, 3)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_arguments_stay_as_they_are(function) -> None:
    table, features = random_rows(4, 6, torch.float32, seed=1), random_rows(2, 6, torch.float32, seed=2)
    ids, rows = torch.tensor([0, 9, 3]), torch.tensor([-1, -1, 1])
    before = [x.clone() for x in (table, features, ids, rows)]
    out = function(ids, table, feature_rows=rows, features=features)
    out.fill_(7.0)
    assert all(torch.equal(x, y) for x, y in zip((table, features, ids, rows), before, strict=True))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("changed", "error", "message"), wrong_calls())
def test_wrong_arguments_are_named(function, changed, error, message) -> None:
    arguments = {
        "ids": torch.zeros(4, dtype=torch.int64),
        "table": torch.zeros(2, 3),
        "feature_rows": torch.zeros(4, dtype=torch.int64),
        "features": torch.zeros(2, 3),
        **changed,
    }
    ids, table = arguments.pop("ids"), arguments.pop("table")
    with pytest.raises(error, match=f"^embed: {message}"):
        function(ids, table, **arguments)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_features_without_their_rows_are_refused(function) -> None:
    with pytest.raises(ValueError, match="embed: feature_rows is None, must be int64"):
        function(torch.zeros(1, dtype=torch.int64), torch.zeros(2, 3), features=torch.zeros(2, 3))
