"""One private Ray for each module of tests that asks for it, and a runner that ranks can import."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)

from dist_vlm.executor.ray import RayExecutor  # noqa: E402
from dist_vlm.executor.ray_cluster import RayCluster  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _importable_stand_in() -> Iterator[None]:
    """What Ray starts inherits this, so `stand_in` can be imported there."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HERE, before]))
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[RayCluster]:
    """An initialised Ray with 4 CPUs: every executor of the module uses it and leaves it."""
    cluster = RayCluster()
    cluster.connect(None, num_cpus=4, use_gpus=False, timeout_s=60)
    yield cluster
    cluster.close()


@pytest.fixture
def make_ray_executor() -> Iterator[Callable[..., RayExecutor]]:
    """Builds executors over the stand-in runner, and shuts them down."""
    from stand_in import RUNNER, rank_config

    made: list[RayExecutor] = []

    def make(world_size: int = 2, model: dict[str, object] | None = None, **options: object) -> RayExecutor:
        defaults: dict[str, object] = {"runner": RUNNER, "start_timeout_s": 60.0, "step_timeout_s": 20.0}
        made.append(RayExecutor(rank_config(world_size, model), **(defaults | options)))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for executor in made:
        executor.shutdown()
