"""How Ray Serve sends requests to replicas: by what they hold, as `replica_affinity.py` decides."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from dist_vlm.launch import replica_report
from dist_vlm.launch.replica_affinity import Affinity, Claim

# Until a replica has told how large its cache is.
_NUM_BLOCKS = 1 << 16


class AffinityRouter(RequestRouter):
    """Serve makes one in each process that has a handle, and runs it in an event loop of its own."""

    def initialize_state(self, **kwargs: Any) -> None:
        """block_size: of the replicas' KV caches."""
        self._affinity = Affinity(kwargs["block_size"])
        replica_report.arrive_at(self.app_name, self.reports)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        num_blocks = {report.replica_id: report.state.num_blocks for report in self.reports()}
        self._affinity.update({name: num_blocks.get(name, _NUM_BLOCKS) for name in replicas})
        if pending_request is not None:
            # All replicas are in one answer: where none has room, Serve waits before it asks again.
            pending_request.routing_context.should_backoff = True
        return [[replicas[name]] for name in self._affinity.rank(replicas, _claim_of(pending_request))]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        request_id = pending_request.metadata.internal_request_id
        self._affinity.begin(replica_id.unique_id, request_id, _claim_of(pending_request))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._affinity.end(replica_id.unique_id, internal_request_id)

    def reports(self) -> list[replica_report.ReplicaReport]:
        replicas = list(self.curr_replicas.values())
        found = (replica_report.read(replica.replica_id.unique_id, replica.routing_stats) for replica in replicas)
        return [report for report in found if report is not None]


def _claim_of(request: PendingRequest | None) -> Claim:
    claim = None if request is None else request.kwargs.get("claim")
    return claim if isinstance(claim, Claim) else Claim((), 1, 1)
