"""The collectives of a group of two processes, and where the group listens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from dist_vlm.workers.comm import host_store, single_rank

ROOT = Path(__file__).resolve().parents[2]

RANK = """
import json, os, sys
import torch
from dist_vlm.workers import comm
rank, world = int(sys.argv[1]), 2
if rank == 0:
    store = comm.host_store("127.0.0.1", world, 30.0)
    print(store.port, flush=True)
else:
    store = comm.join_store("127.0.0.1", int(sys.argv[2]), world, 30.0)
group = comm.join_group(store, rank=rank, world_size=world, backend="gloo", timeout_s=30.0, host="127.0.0.1")
mine = torch.tensor([[1.0, 2.0], [3.0, 5.0]]) * (rank + 1)
summed = mine.clone()
same = group.all_reduce(summed)
gathered = group.all_gather(mine.t())
facts = {
    "in_place": same is summed,
    "summed": summed.tolist(),
    "gathered": gathered.tolist(),
    "count": [group.count.all_reduce, group.count.all_gather, group.count.total],
}
listening = []
own = "/proc/self/fd/"
inodes = {os.readlink(own + fd) for fd in os.listdir(own) if os.path.lexists(own + fd)}
for table in ("tcp", "tcp6"):
    for line in open(f"/proc/net/{table}").read().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
            listening.append(fields[1].split(":")[0])
facts["listening"] = listening
group.all_reduce(torch.zeros(1))
group.close()
group.close()
print(json.dumps(facts), flush=True)
"""


def test_two_ranks_sum_and_gather_and_listen_on_loopback_alone() -> None:
    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RANK, *arguments]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    first = start("0")
    assert first.stdout is not None
    second = start("1", first.stdout.readline().strip())
    for process in (first, second):
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        facts = json.loads(out)
        assert facts["in_place"]
        assert facts["summed"] == [[3.0, 6.0], [9.0, 15.0]]
        assert facts["gathered"] == [[[1.0, 3.0], [2.0, 5.0]], [[2.0, 6.0], [4.0, 10.0]]]
        assert facts["count"] == [1, 1, 2]
        assert facts["listening"]
        assert set(facts["listening"]) <= {"0100007F", "0000000000000000FFFF00000100007F"}


def test_one_rank_counts_nothing() -> None:
    group = single_rank()
    tensor = torch.tensor([1.0, 2.0])
    assert group.all_reduce(tensor) is tensor
    assert group.all_gather(tensor).tolist() == [[1.0, 2.0]]
    assert group.count.total == 0
    group.close()


def test_a_store_takes_a_free_port_each_time() -> None:
    first, second = (host_store("127.0.0.1", 1, 5.0) for _ in range(2))
    assert first.port != second.port
    first.set("key", "value")
    assert first.get("key") == b"value"
