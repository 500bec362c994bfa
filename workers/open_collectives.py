"""Opens what takes the place of the process group's collectives, where ranks, devices and kernels allow it."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dist_vlm.kernels.all_reduce.peer_buffers import MAX_RANKS, PEER_CAPACITY
from dist_vlm.kernels.all_reduce.rules import rules_for
from dist_vlm.workers.collectives import CollectiveError, Collectives, PeerPath, SharedMemoryPath
from dist_vlm.workers.comm import Communicator
from dist_vlm.workers.config import RankConfig
from dist_vlm.workers.failure import describe

# Of what one rank says; more is cut off.
_REASON_BYTES = 500
# Looks of a reader on a GPU, about.
_LOOKS_PER_S = 1_000_000
_MOST_LOOKS = 2**31 - 1
# What `SharedMemoryGroup` takes at most.
_LONGEST_WAIT_S = 86400.0

Result = TypeVar("Result")

_log = logging.getLogger(__name__)


def open_collectives(config: RankConfig, comm: Communicator, store: dist.Store, *, wait_s: float) -> None:
    """Sets `comm.collectives`, or says in the log why the group's own are used. Every rank calls it.

    wait_s: how long a rank waits for the others to open them, and in a collective. Less than the process group does, in
        which those that did not get so far are waited for.
    Raises `CollectiveError` instead where `config.collectives` is "strict".
    """
    if config.collectives == "group":
        return
    reason = _obstacle(config)
    open_together: Callable[[], Collectives] | None = None
    opened: Collectives | None = None
    if reason is None:
        # What fails on one rank alone fails here, before the others wait for it.
        open_together, reason = _tried(config, lambda: _prepare(config, comm, store, wait_s))
    if not all_reasons(comm, reason) and open_together is not None:
        opened, reason = _tried(config, open_together)
    settle(config, comm, opened, reason)


def _tried(config: RankConfig, work: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """What it returns, and None; or None, and why it failed."""
    try:
        return work(), None
    except Exception as error:
        _log.exception("rank %d: the collectives cannot be opened", config.rank)
        return None, describe(error)


def settle(config: RankConfig, comm: Communicator, opened: Collectives | None, reason: str | None) -> None:
    """Gives `comm` the collectives `opened` if no rank has a reason against its own; every rank calls it, and none gets
    them before all have opened theirs."""
    comm.collectives = None
    reasons = all_reasons(comm, reason)
    if not reasons:
        comm.collectives = opened
        return
    if opened is not None:
        opened.close()
    what = "; ".join(f"rank {rank}: {text}" for rank, text in reasons.items())
    if config.collectives == "strict":
        raise CollectiveError(f"parallel.collectives is 'strict', and they cannot be used: {what}")
    if config.rank == 0:
        _log.warning("the collectives are those of %s: %s", dist.get_backend(comm.group), what)


def all_reasons(comm: Communicator, reason: str | None) -> dict[int, str]:
    """What each rank says against the collectives, the same on all ranks. Goes through the process group alone."""
    text = (reason or "").encode()[:_REASON_BYTES]
    row = torch.zeros(_REASON_BYTES, dtype=torch.uint8)
    row[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    rows = comm.gather_on_host(row)
    texts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]
    return {rank: text for rank, text in enumerate(texts) if text}


def _obstacle(config: RankConfig) -> str | None:
    needed = "triton" if config.device == "cuda" else "cpp"
    if config.kernels != needed:
        return f"kernels is {config.kernels!r}, must be {needed!r} for others on {config.device}"
    if config.device == "cuda" and config.world_size > MAX_RANKS:
        return f"world_size is {config.world_size}, must be at most {MAX_RANKS} for others"
    return None


def _prepare(config: RankConfig, comm: Communicator, store: dist.Store, wait_s: float) -> Callable[[], Collectives]:
    """What a rank does by itself; the function returned waits for the others."""
    if config.device == "cuda":
        return _prepare_peers(config, comm, wait_s)
    from dist_vlm.kernels import cpp_library
    from dist_vlm.kernels.shared_memory import SharedMemoryGroup

    if config.rank == 0:
        store.set("segment", f"dist-vlm-{uuid.uuid4().hex}")  # first of all: the others wait for it
    cpp_library.library()
    name = store.get("segment").decode()

    def attach() -> SharedMemoryPath:
        timeout_s = min(wait_s, _LONGEST_WAIT_S)
        segment = SharedMemoryGroup(rank=config.rank, world_size=config.world_size, name=name, timeout_s=timeout_s)
        return SharedMemoryPath(segment)

    return attach


def _prepare_peers(config: RankConfig, comm: Communicator, wait_s: float) -> Callable[[], PeerPath]:
    from dist_vlm.kernels.all_reduce.peer_collectives import PeerCollectives
    from dist_vlm.kernels.all_reduce.symmetric_memory import allocate, share

    device = torch.device("cuda", torch.cuda.current_device())
    rules = rules_for(torch.cuda.get_device_name(device), config.world_size, table=config.collectives_table)
    if dist.get_backend(comm.group) != "nccl":
        rules = rules.without_group()
    memory = allocate(device=device, capacity=PEER_CAPACITY, share_gpu=config.share_gpu)
    # Ranks that share a GPU wait for one another's programs to get a place.
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    max_programs = processors // (2 * config.world_size) if config.share_gpu else None
    max_looks = int(min(wait_s * _LOOKS_PER_S, _MOST_LOOKS))
    group: Any = comm.group

    def rendezvous() -> PeerPath:
        buffers, early = share(memory, group), not config.share_gpu
        peers = PeerCollectives(buffers, max_looks=max_looks, max_programs=max_programs, starts_early=early)
        if config.rank == 0:
            _log.info("collectives over the GPUs' memory, by %s: %s", rules.source, rules)
        return PeerPath(peers, rules, timeout_s=max_looks / _LOOKS_PER_S)

    return rendezvous
