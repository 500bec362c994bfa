"""The stages of a start: actors, join, load, allocate, all under one deadline."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dist_vlm.executor.base import ExecutorInfo, StartError
from dist_vlm.executor.deadline import Deadline
from dist_vlm.executor.errors import death_cause, is_death, rank_error
from dist_vlm.executor.sizes import choose_num_blocks
from dist_vlm.version import __version__
from dist_vlm.workers import wire
from dist_vlm.workers.config import LoadReport, RankConfig
from dist_vlm.workers.failure import describe
from dist_vlm.workers.worker import Worker

if TYPE_CHECKING:
    from dist_vlm.executor.placement import Places

# STRICT_PACK puts all ranks on one machine, so their rendezvous and sockets stay inside it.
_HOST = "127.0.0.1"
# A thread each, beside the one that starts the rank and the one that runs its steps.
_GROUPS = {"staging": 1, "watch": 1, "status": 1}
# When one rank ends, another's collective may fail first; this long the one to blame may take to show.
_BLAME_WAIT_S = 0.5
# Of what the driver waits for a step: ranks give up on one that is missing before that, and name it.
_WAIT_SHARE = 0.8


def create_actors(
    config: RankConfig, places: Places, *, resources: dict[str, float], runner: str, private: bool
) -> list[Any]:
    """One actor a rank, in rank order. Does not wait for them."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    # A private Ray's processes inherit this; asking for it again would keep them from being started ahead.
    environment = None if private or config.device == "cpu" else _gpu_environment()
    make_remote: Any = ray.remote
    actor_class = make_remote(max_restarts=0, max_task_retries=0, concurrency_groups=_GROUPS)(Worker)
    actors = []
    for rank in range(config.world_size):
        options: dict[str, Any] = {
            "num_cpus": resources["CPU"],
            "num_gpus": resources.get("GPU", 0.0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                places.group, placement_group_bundle_index=places.first_bundle + rank
            ),
        }
        if environment is not None:
            options["runtime_env"] = environment
        encoded = wire.encode(dataclasses.replace(config, rank=rank))
        actors.append(actor_class.options(**options).remote(encoded, runner))
    return actors


def _gpu_environment() -> dict[str, Any]:
    return {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}


def start_ranks(
    actors: Sequence[Any], *, deadline: Deadline, collective_timeout_s: float, num_blocks: int | None
) -> ExecutorInfo:
    """Takes every rank through its stages. Raises `StartError` for the first that fails."""
    calls = [actor.prepare.remote(_HOST, deadline.remaining_s) for actor in actors]
    prepared = await_all("actor", calls, deadline=deadline)
    for rank, (version, _) in enumerate(prepared):
        if version != __version__:
            raise StartError("actor", f"the rank runs dist-vlm {version}, the driver {__version__}", rank)
    calls = [actor.prepare_seconds.remote() for actor in actors]
    _note_parts(await_all("actor", calls, deadline=deadline, ends_stage=False), deadline)
    if len(actors) > 1:
        port = prepared[0][1]
        timeout_s = max(deadline.remaining_s, collective_timeout_s)
        wait_s = _WAIT_SHARE * collective_timeout_s
        calls = [actor.join.remote(_HOST, port, timeout_s, wait_s) for actor in actors]
        await_all("join", calls, deadline=deadline)
    loaded = await_all("load", [actor.load.remote() for actor in actors], deadline=deadline)
    reports = tuple(wire.decode(LoadReport, report) for report in loaded)
    blocks = choose_num_blocks(reports, num_blocks)
    await_all("allocate", [actor.allocate.remote(blocks) for actor in actors], deadline=deadline)
    return ExecutorInfo(num_blocks=blocks, reports=reports)


def _note_parts(of_ranks: Sequence[dict[str, float]], deadline: Deadline) -> None:
    """What the parts of the actors' stage took, each on the rank on which it took longest."""
    seconds: dict[str, float] = {}
    for parts in of_ranks:
        for part, took in parts.items():
            seconds[part] = max(took, seconds.get(part, 0.0))
    for part, took in seconds.items():
        deadline.note(f"actor: {part}", took)


def await_all(stage: str, refs: Sequence[Any], *, deadline: Deadline, ends_stage: bool = True) -> list[Any]:
    """What each rank's call returned. Raises `StartError` for the first that fails, or the first that is late."""
    import ray

    waiting = list(refs)
    while waiting:
        ended, waiting = ray.wait(waiting, num_returns=1, timeout=deadline.remaining_s)
        if not ended:
            late = [rank for rank, ref in enumerate(refs) if ref in waiting]
            cause = f"not done within start_timeout_s = {deadline.seconds:g}"
            others = "" if len(late) == 1 else f", nor are ranks {', '.join(map(str, late[1:]))}"
            raise StartError(stage, cause + others, late[0])
        if _error_of(ended[0]) is not None:
            raise _blame(stage, refs)
    if ends_stage:
        deadline.lap(stage)
    return [ray.get(ref) for ref in refs]


def _error_of(ref: Any) -> BaseException | None:
    import ray

    try:
        ray.get(ref)
    except Exception as error:
        return error
    return None


def _blame(stage: str, refs: Sequence[Any]) -> StartError:
    """The failure to tell of: a rank whose process died before one that only lost its peer."""
    import ray

    ended, _ = ray.wait(list(refs), num_returns=len(refs), timeout=_BLAME_WAIT_S)
    failures = [(rank, error) for rank, ref in enumerate(refs) if ref in ended and (error := _error_of(ref))]
    for rank, error in failures:
        if is_death(error):
            return StartError(stage, death_cause(error), rank)
    rank, error = failures[0]
    told = rank_error(error)
    return StartError(told.stage, told.cause, told.rank) if told else StartError(stage, describe(error), rank)
