"""Opens what takes the place of the process group's collectives, where ranks, devices and kernels allow it."""

from __future__ import annotations

import logging
import uuid
from typing import Any

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
# Looks at a GPU's own memory that take a second at least; most take longer.
_LOOKS_PER_S = 2_000_000

_log = logging.getLogger(__name__)


def open_collectives(config: RankConfig, comm: Communicator, store: dist.Store, *, timeout_s: float) -> None:
    """Sets `comm.collectives`, or says in the log why the group's own are used. Every rank calls it.

    Raises `CollectiveError` instead where `config.collectives` is "strict".
    """
    if config.collectives == "group":
        return
    reason = _obstacle(config)
    opened: Collectives | None = None
    if reason is None:
        try:
            opened = _open(config, comm, store, timeout_s)
        except Exception as error:
            _log.exception("rank %d: the collectives cannot be opened", config.rank)
            reason = describe(error)
    settle(config, comm, opened, reason)


def settle(config: RankConfig, comm: Communicator, opened: Collectives | None, reason: str | None) -> None:
    """Gives `comm` the collectives `opened` if no rank has a reason against its own; every rank calls it."""
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


def _open(config: RankConfig, comm: Communicator, store: dist.Store, timeout_s: float) -> Collectives:
    if config.device == "cuda":
        return _open_peers(config, comm, timeout_s)
    from dist_vlm.kernels.shared_memory import SharedMemoryGroup

    if config.rank == 0:
        store.set("segment", f"dist-vlm-{uuid.uuid4().hex}")
    name = store.get("segment").decode()
    segment = SharedMemoryGroup(rank=config.rank, world_size=config.world_size, name=name, timeout_s=timeout_s)
    return SharedMemoryPath(segment)


def _open_peers(config: RankConfig, comm: Communicator, timeout_s: float) -> PeerPath:
    from dist_vlm.kernels.all_reduce.peer_collectives import PeerCollectives
    from dist_vlm.kernels.all_reduce.symmetric_memory import open_buffers

    device = torch.device("cuda", torch.cuda.current_device())
    rules = rules_for(torch.cuda.get_device_name(device), config.world_size, table=config.collectives_table)
    if dist.get_backend(comm.group) != "nccl":
        rules = rules.without_group()
    group: Any = comm.group
    buffers = open_buffers(group, device=device, capacity=PEER_CAPACITY, share_gpu=config.share_gpu)
    # Ranks that share a GPU wait for one another's programs to get a place.
    share = torch.cuda.get_device_properties(device).multi_processor_count // (2 * config.world_size)
    peers = PeerCollectives(
        buffers,
        max_looks=int(min(timeout_s * _LOOKS_PER_S, 2**31 - 1)),
        max_programs=share if config.share_gpu else None,
    )
    if config.rank == 0:
        _log.info("collectives over the GPUs' memory, by %s: %s", rules.source, rules)
    return PeerPath(peers, rules, timeout_s=timeout_s)
