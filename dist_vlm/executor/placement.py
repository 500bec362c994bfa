"""Where the ranks go: one placement group, all of it on one machine.

An engine that is an actor itself, as one replica of several is, has its ranks in the group that was made for it: bundle
0 is its own, and one a rank follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dist_vlm.executor.base import StartError
from dist_vlm.workers.config import RankConfig

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from dist_vlm.config import ParallelConfig


STRATEGY = "STRICT_PACK"
# Of a core: in a private Ray nobody else asks for one, and several engines of a process fit beside each other.
PRIVATE_CPUS = 0.125


@dataclass(frozen=True)
class Places:
    """A placement group with a bundle for each rank.

    first_bundle: rank 0's; the others follow in the order of the ranks.
    is_ours: whether it was made for the ranks alone, and goes with them.
    """

    group: PlacementGroup
    first_bundle: int
    is_ours: bool


def bundle(*, device: str, world_size: int, share_gpu: bool = False, cpus: float = 1.0) -> dict[str, float]:
    """What Ray reserves for one rank. Ranks that share a GPU take equal parts of one."""
    if device != "cuda":
        return {"CPU": cpus}
    # Ray counts in units of 1/10000.
    gpu = (10_000 // world_size) / 10_000 if share_gpu else 1.0
    return {"CPU": cpus, "GPU": gpu}


def engine_bundles(*, device: str, world_size: int, share_gpu: bool = False) -> list[dict[str, float]]:
    """What Ray reserves, with `STRATEGY`, for an engine that is an actor: a core for itself, and the ranks'."""
    one = bundle(device=device, world_size=world_size, share_gpu=share_gpu)
    return [{"CPU": 1.0}, *(dict(one) for _ in range(world_size))]


def engine_bundles_of(parallel: ParallelConfig) -> list[dict[str, float]]:
    """`engine_bundles` of a resolved configuration's section."""
    return engine_bundles(
        device=parallel.device, world_size=parallel.tensor_parallel_size, share_gpu=parallel.share_gpu
    )


def of_this_actor(config: RankConfig) -> Places | None:
    """The group that this process was placed in as an actor, if it has `engine_bundles`; else None."""
    import ray

    group = ray.util.get_current_placement_group()
    wanted = engine_bundles(device=config.device, world_size=config.world_size, share_gpu=config.share_gpu)
    if group is None or group.bundle_specs != wanted:
        return None
    return Places(group, first_bundle=1, is_ours=False)


def reserve(config: RankConfig, *, cpus: float = 1.0) -> Places:
    """Asks for one bundle a rank on one machine. Raises `StartError` at once where no machine could ever hold them."""
    from ray.util.placement_group import placement_group

    bundles = [rank_bundle(config, cpus=cpus) for _ in range(config.world_size)]
    check_fits(bundles, what=f"{config.world_size} ranks need")
    return Places(placement_group(bundles, strategy=STRATEGY), first_bundle=0, is_ours=True)


def rank_bundle(config: RankConfig, *, cpus: float = 1.0) -> dict[str, float]:
    return bundle(device=config.device, world_size=config.world_size, share_gpu=config.share_gpu, cpus=cpus)


def ready(group: PlacementGroup, timeout_s: float) -> None:
    """Waits until the bundles are reserved. Raises `StartError` with what is free after `timeout_s`."""
    if group.wait(timeout_s):
        return
    asked = render_sum(group.bundle_specs)
    raise StartError("placement", f"{asked} on one machine did not become free in time; free in the cluster: {free()}")


def is_here(group: PlacementGroup) -> bool:
    """Whether a group whose bundles are reserved is on this process's machine."""
    import ray

    table: Any = ray.util.placement_group_table(group)
    return set(table["bundles_to_node_id"].values()) == {ray.get_runtime_context().get_node_id()}


def check_fits(bundles: Sequence[dict[str, float]], *, what: str) -> None:
    """Raises `StartError`, beginning with `what`, where no machine there is now could ever hold the bundles."""
    total = _sum(bundles)
    for node in _machines():
        if all(node.get(name, 0.0) + 1e-6 >= amount for name, amount in total.items()):
            return
    raise StartError("placement", f"{what} {_render(total)} on one machine; Ray has, a machine: {machines()}")


def machines() -> str:
    """What each machine of the cluster has in all."""
    return "; ".join(map(_render, _machines())) or "no machine"


def free() -> str:
    import ray

    return _render(ray.available_resources())


def render_sum(bundles: Iterable[dict[str, float]]) -> str:
    return _render(_sum(bundles))


def _sum(bundles: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for one in bundles:
        for name, amount in one.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _machines() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _render(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0.0):g} {name}" for name in ("CPU", "GPU"))
