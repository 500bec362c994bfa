"""Calls of `embed` whose results are known row by row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Embed = Callable[..., Tensor]
FAR = 2**63 - 1


def random_rows(count: int, hidden: int, dtype: torch.dtype, *, seed: int) -> Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_shards_add_up(embed: Embed, vocab: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    """One, two, three and seven shards, the last ones padded, with features of three images on the first alone."""
    whole = random_rows(vocab, hidden, dtype, seed=1).to(device)
    features = random_rows(7, hidden, dtype, seed=2).to(device)
    generator = torch.Generator().manual_seed(3)
    ids = torch.cat((torch.arange(vocab).flip(0), torch.randint(0, vocab, (20,), generator=generator)))
    feature_rows = torch.full(ids.shape, -1)
    feature_rows[1:4], feature_rows[8:10], feature_rows[-2:] = (
        torch.arange(3),
        torch.tensor([3, 4]),
        torch.tensor([6, 5]),
    )
    expected = whole[ids]
    merged = expected.clone()
    merged[1:4], merged[8:10], merged[-2], merged[-1] = features[:3], features[3:5], features[6], features[5]
    ids, feature_rows = ids.to(device), feature_rows.to(device)
    for world_size in (1, 2, 3, 7):
        count = -(-vocab // world_size)
        table = torch.zeros(world_size * count, hidden, dtype=dtype, device=device)
        table[:vocab] = whole
        tables = table.split(count)
        plain = [embed(ids, part, first=rank * count) for rank, part in enumerate(tables)]
        assert torch.equal(sum(plain, torch.zeros_like(expected)), expected)
        parts = [
            embed(ids, part, first=rank * count, feature_rows=feature_rows, features=None if rank else features)
            for rank, part in enumerate(tables)
        ]
        assert torch.equal(sum(parts, torch.zeros_like(merged)), merged)
        assert all(part.dtype == dtype for part in parts)


def check_edges(embed: Embed, device: torch.device) -> None:
    """Ids on both sides of both ends of a shard, in a table between rows that must not be read."""
    wide = torch.full((9, 5), torch.nan, device=device)
    wide[3:6] = torch.arange(1.0, 16.0, device=device).view(3, 5)
    ids = torch.tensor([9, 10, 11, 12, 13, 14, 0, -1, -10, FAR, -FAR - 1, 2**32 + 10], device=device)
    out = embed(ids, wide[3:6], first=10)
    assert torch.equal(out[1:4], wide[3:6])
    assert not out[[0, *range(4, 12)]].any()


def check_feature_rows_outside(embed: Embed, device: torch.device) -> None:
    """A row past the features is zero, any negative one is none; the tokens' own ids do not matter in their places."""
    table = torch.ones(2, 3, device=device)
    wide = torch.full((6, 3), torch.nan, device=device)
    wide[2:4] = torch.tensor([[5.0], [6.0]], device=device)
    ids = torch.tensor([0, 1, -1, 99, FAR, 0, 1], device=device)
    feature_rows = torch.tensor([2, FAR, 0, 1, -1, -2, -FAR - 1], device=device)
    out = embed(ids, table, feature_rows=feature_rows, features=wide[2:4])
    assert out[:, 0].tolist() == [0, 0, 5, 6, 0, 1, 1]
    assert torch.equal(out, out[:, :1].expand(7, 3))
    for nothing in (wide[:0], None):
        out = embed(ids, table, feature_rows=feature_rows, features=nothing)
        assert out[:, 0].tolist() == [0, 0, 0, 0, 0, 1, 1]


def wrong_calls() -> list[tuple[dict[str, Tensor], type[Exception], str]]:
    """Changed arguments, error, message."""
    return [
        ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"ids has shape \[2, 2\], must be \[any\]"),
        ({"ids": torch.zeros(4, dtype=torch.int32)}, TypeError, "ids has dtype torch.int32, must be torch.int64"),
        ({"ids": torch.zeros(8, dtype=torch.int64)[::2]}, ValueError, "ids has strides"),
        ({"table": torch.zeros(3)}, ValueError, r"table has shape \[3\], must be \[any, any\]"),
        ({"table": torch.zeros(0, 3)}, ValueError, r"table has shape \[0, 3\], must have a row"),
        ({"table": torch.zeros(3, 5).T}, ValueError, "table has strides"),
        (
            {"feature_rows": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"feature_rows has shape \[3\], must be \[4\]",
        ),
        ({"feature_rows": torch.zeros(4)}, TypeError, "feature_rows has dtype torch.float32, must be torch.int64"),
        ({"feature_rows": torch.zeros(8, dtype=torch.int64)[::2]}, ValueError, "feature_rows has strides"),
        ({"features": torch.zeros(2, 4)}, ValueError, r"features has shape \[2, 4\], must be \[any, 3\]"),
        ({"features": torch.zeros(2, 3).half()}, TypeError, "features has dtype torch.float16, must be torch.float32"),
        ({"features": torch.zeros(3, 2).T}, ValueError, "features has strides"),
    ]
