"""What is reserved for a rank; that it is found or refused is in test_ray.py."""

from __future__ import annotations

import pytest
from stand_in import rank_config

from dist_vlm.executor.placement import bundle


@pytest.mark.parametrize(
    ("world_size", "changes", "expected"),
    [
        (2, {}, {"CPU": 1.0}),
        (2, {"device": "cuda"}, {"CPU": 1.0, "GPU": 1.0}),
        (2, {"device": "cuda", "share_gpu": True}, {"CPU": 1.0, "GPU": 0.5}),
        (3, {"device": "cuda", "share_gpu": True}, {"CPU": 1.0, "GPU": 0.3333}),
    ],
)
def test_a_ranks_bundle(world_size: int, changes: dict[str, object], expected: dict[str, float]) -> None:
    reserved = bundle(rank_config(world_size, **changes))
    assert reserved == expected
    assert changes.get("share_gpu") is None or world_size * reserved["GPU"] <= 1.0
