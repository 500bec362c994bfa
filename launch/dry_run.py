"""`dist-vlm submit --dry-run`: a launch as it would be, and where Ray would place its replicas.

The cluster is made up: the machines that the launch names, with just the cores and GPUs that its replicas ask for, and
a head without either. Ray itself places, on resources that are only counted.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dist_vlm.config import EngineConfig
from dist_vlm.config_load import LoadedConfig
from dist_vlm.executor import placement
from dist_vlm.executor.base import StartError
from dist_vlm.executor.deadline import Deadline
from dist_vlm.executor.ray_cluster import RayCluster, loopback, with_token
from dist_vlm.launch.config_show import shown

_STORE_BYTES = 80 << 20


def dry_run(loaded: LoadedConfig) -> None:
    """Prints the launch, then a line a replica. Raises `StartError` with what does not fit."""
    has_checkpoint = os.path.isdir(loaded.config.model.model)
    print(shown(loaded, sources=False, checkpoint=has_checkpoint, server=loaded.has_server, environ=os.environ), end="")
    if not has_checkpoint:
        print(f"# {loaded.config.model.model} is not on this machine: what the checkpoint decides stays open")
    sys.stdout.flush()
    config = loaded.resolve(checkpoint=has_checkpoint)
    with made_up_cluster(config) as address:
        cluster = RayCluster()
        cluster.connect(address, num_cpus=0, use_gpus=False, timeout_s=config.parallel.start_timeout_s)
        try:
            for number, node in enumerate(placed(config)):
                print(f"# replica {number}: {config.parallel.tensor_parallel_size} ranks on {node}")
        finally:
            cluster.close()


def placed(config: EngineConfig) -> list[str]:
    """Reserves what each replica asks for in the Ray that is connected, and gives it back; the machine of each.

    Raises `StartError` with what is asked and what there is, after start_timeout_s at the latest.
    """
    import ray
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    parallel = config.parallel
    bundles = placement.engine_bundles_of(parallel)
    placement.check_fits(bundles, what="a replica needs")
    deadline = Deadline(parallel.start_timeout_s)
    groups: list[Any] = []
    try:
        groups += [placement_group(bundles, strategy=placement.STRATEGY) for _ in range(parallel.replicas)]
        for number, group in enumerate(groups):
            if not group.wait(deadline.remaining_s):
                raise StartError(
                    "placement",
                    f"{number} of {parallel.replicas} replicas could be placed; each asks for "
                    f"{placement.render_sum(bundles)} on one machine; Ray has, a machine: {placement.machines()}",
                )
        names = {node["NodeID"]: _name_of(index, node) for index, node in enumerate(ray.nodes())}
        return [
            names[node] for group in groups for node in set(placement_group_table(group)["bundles_to_node_id"].values())
        ]
    finally:
        for group in groups:
            remove_placement_group(group)


def _name_of(index: int, node: dict[str, Any]) -> str:
    return f"machine {index} ({node['NodeManagerAddress']}, {node['NodeID'][:8]})"


@contextmanager
def made_up_cluster(config: EngineConfig) -> Iterator[str]:
    """The address of a Ray cluster of as many machines as the launch names, all of them on this one."""
    from ray.cluster_utils import Cluster

    with _folder() as folder, loopback(), with_token(), _real_address_kept():
        # None of a real head's ports, nor its place for sessions.
        own = {"temp_dir": folder, "dashboard_port": 0, "dashboard_agent_listen_port": None}
        cluster = Cluster(initialize_head=True, head_node_args=node_options(0, 0) | own)
        try:
            for _ in range(config.parallel.num_nodes):
                cluster.add_node(**node_options(*node_size(config)))
            yield cluster.address
        finally:
            cluster.shutdown()


def _folder() -> tempfile.TemporaryDirectory[str]:
    """Near the root: Ray's sockets in it have long names, and the kernel takes 107 characters."""
    return tempfile.TemporaryDirectory(prefix="dvlm-", dir="/tmp", ignore_cleanup_errors=True)


@contextmanager
def _real_address_kept() -> Iterator[None]:
    """The made-up cluster's address is written where Ray finds that of a real head on this machine, and deleted."""
    utils: Any = importlib.import_module("ray._private.utils")
    before = utils.read_ray_address()
    try:
        yield
    finally:
        if before is not None:
            utils.write_ray_address(before)


def node_size(config: EngineConfig) -> tuple[int, int]:
    """Cores and GPUs of each machine that a launch names."""
    parallel = config.parallel
    number = -(-parallel.replicas // parallel.num_nodes)
    ranks = parallel.tensor_parallel_size
    gpus = (1 if parallel.share_gpu else ranks) if parallel.device == "cuda" else 0
    return number * (1 + ranks), number * gpus


def node_options(num_cpus: int, num_gpus: int) -> dict[str, Any]:
    return {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "node_ip_address": "127.0.0.1",
        "include_dashboard": False,
        "object_store_memory": _STORE_BYTES,
    }
