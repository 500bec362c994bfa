"""Where the ranks go: one placement group, all of it on one machine.

An engine that is an actor itself, as one replica of several is, has its ranks in the group that was made for it: bundle
0 is its own, and one a rank follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dist_vlm.executor.base import StartError
from dist_vlm.workers.config import RankConfig

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup


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

    one = bundle_of(config, cpus=cpus)
    _check_fits(one, config.world_size)
    group = placement_group([dict(one) for _ in range(config.world_size)], strategy=STRATEGY)
    return Places(group, first_bundle=0, is_ours=True)


def bundle_of(config: RankConfig, *, cpus: float = 1.0) -> dict[str, float]:
    return bundle(device=config.device, world_size=config.world_size, share_gpu=config.share_gpu, cpus=cpus)


def ready(group: PlacementGroup, timeout_s: float) -> None:
    """Waits until the bundles are reserved. Raises `StartError` with what is free after `timeout_s`."""
    import ray

    if group.wait(timeout_s):
        return
    asked = _render({name: sum(part.get(name, 0) for part in group.bundle_specs) for name in ("CPU", "GPU")})
    free = _render(ray.available_resources())
    raise StartError("placement", f"{asked} on one machine did not become free in time; free in the cluster: {free}")


def _check_fits(one: dict[str, float], world_size: int) -> None:
    import ray

    total = {name: amount * world_size for name, amount in one.items()}
    nodes: list[dict[str, Any]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(name, 0.0) + 1e-6 >= amount for name, amount in total.items()) for node in nodes):
        return
    there = "; ".join(_render(node) for node in nodes) or "no machine"
    raise StartError(
        "placement", f"{world_size} ranks need {_render(total)} on one machine; Ray has, a machine: {there}"
    )


def _render(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0.0):g} {name}" for name in ("CPU", "GPU"))
