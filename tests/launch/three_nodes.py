"""A Ray cluster on this machine: a head that has no room for a rank, and nodes of the size of one replica."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.cluster_utils import Cluster

from dist_vlm.executor import semaphores
from dist_vlm.executor.ray_cluster import loopback

_STORE_BYTES = 100 << 20


class Nodes:
    """node_cpus: of each node but the head."""

    def __init__(self, cluster: Any, *, num_nodes: int, node_cpus: int) -> None:
        self._cluster = cluster
        self._node_cpus = node_cpus
        self.address: str = cluster.address
        self.raylets = [_raylet_of(cluster.head_node)]
        self.nodes = [self.add() for _ in range(num_nodes)]

    def add(self) -> Any:
        node = self._cluster.add_node(
            num_cpus=self._node_cpus, num_gpus=0, node_ip_address="127.0.0.1", object_store_memory=_STORE_BYTES
        )
        self.raylets.append(_raylet_of(node))
        return node

    def remove(self, node: Any) -> None:
        self._cluster.remove_node(node)


@contextmanager
def started(*, num_nodes: int, node_cpus: int) -> Iterator[Nodes]:
    head = {
        "num_cpus": 1,
        "num_gpus": 0,
        "node_ip_address": "127.0.0.1",
        "include_dashboard": False,
        "object_store_memory": _STORE_BYTES,
    }
    with loopback():
        cluster, nodes = Cluster(initialize_head=True, head_node_args=head), None
        try:
            nodes = Nodes(cluster, num_nodes=num_nodes, node_cpus=node_cpus)
            yield nodes
        finally:
            cluster.shutdown()
            if nodes is not None:
                semaphores.remove_those_of(nodes.raylets, within_s=10)


def _raylet_of(node: Any) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid
