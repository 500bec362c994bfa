"""One rank of `dist-vlm tune-collectives`: `python -m dist_vlm.launch.collective_rank JOB`, JOB being JSON.

Rank 0 says the port of the group's rendezvous in a first line, and what was measured, as JSON, in one that begins with
`FOUND`: libraries may print, too.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

FOUND = "measured: "
_HOST = "127.0.0.1"
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class RankJob:
    """port: of rank 0's rendezvous; 0 for rank 0, which opens it."""

    rank: int
    world_size: int
    port: int
    hidden_size: int
    columns: int
    dtype: str
    row_counts: list[int]
    others: bool

    def line(self) -> str:
        return json.dumps(asdict(self))


def main(line: str) -> None:
    import torch

    from dist_vlm.launch.collective_times import CollectiveTimes
    from dist_vlm.workers import comm

    job = RankJob(**json.loads(line))
    torch.cuda.set_device(job.rank)
    if job.rank == 0:
        store = comm.host_store(_HOST, job.world_size, _TIMEOUT_S)
        print(store.port, flush=True)
    else:
        store = comm.join_store(_HOST, job.port, job.world_size, _TIMEOUT_S)
    group = comm.join_group(
        store, rank=job.rank, world_size=job.world_size, backend="nccl", timeout_s=_TIMEOUT_S, host=_HOST
    )
    assert group.group is not None
    times = CollectiveTimes(
        group.group, hidden_size=job.hidden_size, columns=job.columns, dtype=getattr(torch, job.dtype)
    )
    found = {
        "device": torch.cuda.get_device_name(),
        "link_bytes_per_s": times.link_bytes_per_s(),
        "times": times.measure(job.row_counts, others=job.others),
    }
    if job.rank == 0:
        print(FOUND + json.dumps(found), flush=True)
    group.close()


if __name__ == "__main__":
    main(sys.argv[1])
