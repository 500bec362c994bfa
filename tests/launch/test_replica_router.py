"""What Serve's router asks and is told; on a cluster it is in test_replica_client.py."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from dist_vlm.engine.state import EngineState
from dist_vlm.launch import replica_report
from dist_vlm.launch.replica_affinity import Affinity, Claim
from dist_vlm.launch.replica_router import AffinityRouter
from dist_vlm.sched.scheduler import SchedulerStats


def replica(name: str, num_blocks: int | None = None) -> Any:
    stats = {}
    if num_blocks is not None:
        state = EngineState(SchedulerStats(), 0, 0, 0, num_blocks, 0, 0, 0, None, 0, 0, 0)
        stats = replica_report.written(state, (0.1,))
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), routing_stats=stats)


def request(name: str, claim: Any) -> Any:
    return SimpleNamespace(
        kwargs={} if claim is None else {"claim": claim},
        metadata=SimpleNamespace(internal_request_id=name),
        routing_context=SimpleNamespace(should_backoff=False),
    )


def claim(name: str, num_blocks: int = 10) -> Claim:
    return Claim(tuple(f"{name}{index}".encode() for index in range(num_blocks)), 16 * num_blocks, 10)


@pytest.fixture
def router() -> AffinityRouter:
    router = AffinityRouter.__new__(AffinityRouter)  # Serve makes it in its own processes
    router._affinity = Affinity(16)
    router._replicas = {}
    return router


def chosen(router: AffinityRouter, replicas: list[Any], asked: Any) -> list[str]:
    router._replicas = dict(enumerate(replicas))
    ranks = asyncio.run(router.choose_replicas(replicas, asked))
    assert all(len(rank) == 1 for rank in ranks)
    return [rank[0].replica_id.unique_id for rank in ranks]


def test_all_replicas_are_ranked_and_the_holder_is_first(router: AffinityRouter) -> None:
    replicas = [replica("a"), replica("b")]
    first = request("1", claim("p"))
    home, other = chosen(router, replicas, first)
    assert first.routing_context.should_backoff, "or Serve would ask again at once where all are full"
    router.on_request_routed(first, SimpleNamespace(unique_id=home), None)
    assert chosen(router, replicas, request("2", claim("q")))[0] == other
    assert chosen(router, replicas, request("3", claim("p"))) == [home, other]
    router.on_request_completed(SimpleNamespace(unique_id=home), "1")
    assert chosen(router, replicas, request("4", claim("p"))) == [home, other]


def test_a_cache_is_as_large_as_its_replica_tells(router: AffinityRouter) -> None:
    replicas = [replica("a", num_blocks=4), replica("b", num_blocks=4)]
    first = request("1", claim("p"))
    home = chosen(router, replicas, first)[0]
    router.on_request_routed(first, SimpleNamespace(unique_id=home), None)
    router.on_request_completed(SimpleNamespace(unique_id=home), "1")
    assert chosen(router, replicas, request("2", claim("p")))[0] != home, "of ten blocks four are left: less than half"


def test_a_call_without_a_claim_goes_anywhere(router: AffinityRouter) -> None:
    replicas = [replica("a"), replica("b")]
    assert sorted(chosen(router, replicas, request("1", None))) == ["a", "b"]
    assert sorted(chosen(router, replicas, request("1", "no claim"))) == ["a", "b"]
    assert chosen(router, [], request("1", None)) == []


def test_its_reports_are_of_the_replicas_that_have_told(router: AffinityRouter) -> None:
    router._replicas = {"a": replica("a"), "b": replica("b", num_blocks=7)}
    assert [(one.replica_id, one.state.num_blocks) for one in router.reports()] == [("b", 7)]
