"""Every shipped launch, placed by Ray on machines of the size it names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from dist_vlm.config import EngineConfig
from dist_vlm.config_load import load_config
from dist_vlm.executor.base import StartError
from dist_vlm.executor.ray_cluster import loopback
from dist_vlm.launch import cli
from dist_vlm.launch.dry_run import node_options, node_size, placed

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Of one machine that has nothing."""
    with loopback():
        cluster = Cluster(initialize_head=True, head_node_args=node_options(0, 0))
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def machines(cluster: Any) -> Iterator[Any]:
    """Adds the machines that a launch names, and takes them away again."""
    added: list[Any] = []

    def add(config: EngineConfig) -> None:
        added.extend(cluster.add_node(**node_options(*node_size(config))) for _ in range(config.parallel.num_nodes))

    yield add
    for node in added:
        cluster.remove_node(node)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_each_shipped_launch_is_placed(file: Path, machines: Any) -> None:
    config = load_config(str(file)).resolve(checkpoint=False)
    machines(config)
    found = Counter(placed(config))
    assert sum(found.values()) == config.parallel.replicas
    assert len(found) == config.parallel.num_nodes
    assert max(found.values()) == config.parallel.replicas // config.parallel.num_nodes
    assert not [one for one in ray.util.placement_group_table().values() if one["state"] != "REMOVED"], "given back"


def test_what_is_more_than_there_is_is_told(machines: Any) -> None:
    config = EngineConfig.from_fields(model="/m", device="cuda", tensor_parallel_size=2, replicas=2, num_nodes=2)
    machines(config)
    more = config.replace(replicas=3, start_timeout_s=2)
    with pytest.raises(StartError, match=r"2 of 3 replicas could be placed; each asks for 3 CPU, 2 GPU on one machine"):
        placed(more)
    with pytest.raises(
        StartError, match=r"a replica needs 4 CPU, 3 GPU on one machine; Ray has, a machine: .*3 CPU, 2"
    ):
        placed(config.replace(tensor_parallel_size=3))


def test_by_hand(
    cluster: Any, machines: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command makes a cluster of its own; here it is given the one there is, since a process has one Ray."""
    file = next(file for file in CONFIGS if "2node" in file.stem)
    monkeypatch.setattr("dist_vlm.launch.dry_run.made_up_cluster", lambda config: _there(cluster, machines, config))
    assert cli.main(["submit", "--dry-run", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  replicas: 2" in lines
    assert any("is not on this machine: what the checkpoint decides stays open" in line for line in lines)
    told = [line for line in lines if line.startswith("# replica ")]
    assert [line.partition(" (")[0][:-1] for line in told] == [f"# replica {n}: 8 ranks on machine " for n in range(2)]
    assert len({line.rpartition(", ")[2] for line in told}) == 2


class _there:  # noqa: N801 - stands in for a function
    def __init__(self, cluster: Any, machines: Any, config: EngineConfig) -> None:
        machines(config)
        self._address = cluster.address

    def __enter__(self) -> str:
        return self._address

    def __exit__(self, *error: object) -> None: ...
