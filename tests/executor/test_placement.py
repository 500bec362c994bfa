"""What is reserved for a rank and for an engine; that it is found or refused is in test_ray.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from stand_in import rank_config

from dist_vlm.executor.placement import engine_bundles, is_here, of_this_actor, rank_bundle


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
    reserved = rank_bundle(rank_config(world_size, **changes))
    assert reserved == expected
    assert changes.get("share_gpu") is None or world_size * reserved["GPU"] <= 1.0


def test_an_engines_bundles_are_its_own_and_its_ranks() -> None:
    assert engine_bundles(device="cuda", world_size=2) == [{"CPU": 1.0}, *[{"CPU": 1.0, "GPU": 1.0}] * 2]


@pytest.mark.parametrize(
    ("group", "is_taken"),
    [
        (None, False),
        ([{"CPU": 1.0}] * 3, True),
        ([{"CPU": 1.0}] * 2, False),  # a group of the caller's that has no place for a rank
        ([{"CPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}], False),
    ],
)
def test_the_group_an_actor_is_in_is_taken_where_it_fits(
    monkeypatch: pytest.MonkeyPatch, group: list[dict[str, float]] | None, is_taken: bool
) -> None:
    current = None if group is None else SimpleNamespace(bundle_specs=group)
    monkeypatch.setattr(ray.util, "get_current_placement_group", lambda: current)
    places = of_this_actor(rank_config(2))
    assert (places is not None) == is_taken
    assert places is None or (places.group is current and places.first_bundle == 1 and not places.is_ours)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [({0: "mine", 1: "mine"}, True), ({0: "other", 1: "other"}, False), ({0: "mine", 1: "other"}, False), ({}, False)],
)
def test_a_group_is_here_if_all_of_it_is(
    monkeypatch: pytest.MonkeyPatch, nodes: dict[int, str], expected: bool
) -> None:
    tables = {"group": {"bundles_to_node_id": nodes}}
    monkeypatch.setattr(ray.util, "placement_group_table", lambda group: tables[group])
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "mine"))
    group: Any = "group"
    assert is_here(group) == expected
