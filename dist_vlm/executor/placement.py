"""Where the ranks go: one placement group, all of it on one machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dist_vlm.executor.base import StartError
from dist_vlm.workers.config import RankConfig

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup


# Of a core: in a private Ray nobody else asks for one, and several engines of a process fit beside each other.
PRIVATE_CPUS = 0.125


def bundle(config: RankConfig, *, cpus: float = 1.0) -> dict[str, float]:
    """What Ray reserves for one rank. Ranks that share a GPU take equal parts of one."""
    if config.device != "cuda":
        return {"CPU": cpus}
    # Ray counts in units of 1/10000.
    gpu = (10_000 // config.world_size) / 10_000 if config.share_gpu else 1.0
    return {"CPU": cpus, "GPU": gpu}


def reserve(config: RankConfig, *, cpus: float = 1.0) -> PlacementGroup:
    """Asks for one bundle a rank on one machine. Raises `StartError` at once where no machine could ever hold them."""
    from ray.util.placement_group import placement_group

    one = bundle(config, cpus=cpus)
    _check_fits(one, config.world_size)
    return placement_group([dict(one) for _ in range(config.world_size)], strategy="STRICT_PACK")


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
