"""A rank of a real group, with the collectives that a launch would open: `collective_ranks.py JOB`, JOB being JSON.

Rank 0 says the rendezvous' port in its first line; every rank says what it found, as JSON, in its last.
fault: "twice": this rank's part is added twice; "closed": the rank ends in the middle; "": none.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from dist_vlm.kernels.reduce_add_norm import reduce_add_norm_torch
from dist_vlm.workers import comm
from dist_vlm.workers.certificate import Certificate
from dist_vlm.workers.collectives import CollectiveError
from dist_vlm.workers.config import RankConfig
from dist_vlm.workers.failure import describe
from dist_vlm.workers.open_collectives import open_collectives, settle

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, COLUMNS, MAX_ROWS = 96, 50, 700


def config_of(job: dict[str, Any]) -> RankConfig:
    on_gpu = job["device"] == "cuda"
    return RankConfig(
        model="", dtype=job["dtype"], device=job["device"], load_format="dummy", rank=job["rank"],
        world_size=job["world_size"], block_size=16, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=MAX_ROWS,
        gpu_memory_utilization=0.9, kv_cache_bytes=None, num_threads=1, kernels=job.get("kernels") or
        ("triton" if on_gpu else "cpp"), share_gpu=job["share_gpu"], collectives=job["collectives"],
        collectives_table=job.get("table"), halve_step_tokens=None, seed=0,
        feature_cache_tokens=16, vision_data_parallel=True,
    )  # fmt: skip


class AddsTwice:
    """Collectives in which this rank's part counts twice."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def all_reduce(self, tensor: torch.Tensor) -> bool:
        return self.inner.all_reduce(tensor.mul_(2))

    def reduce_add_norm(self, partial: torch.Tensor, *rest: Any, **named: Any) -> Any:
        return self.inner.reduce_add_norm(partial.mul_(2), *rest, **named)


def rounds(group: comm.Communicator, job: dict[str, Any], device: torch.device) -> int:
    """Numbers that were wrong in so many calls of all sizes, on whole numbers."""
    dtype, world = getattr(torch, job["dtype"]), job["world_size"]
    wrong = 0
    weight = torch.ones(HIDDEN, dtype=dtype, device=device)
    for number in range(job["rounds"]):
        rows = 1 + number * 37 % MAX_ROWS if number % 5 == 0 else 1 + number % 3
        place = torch.arange(rows * HIDDEN, device=device).view(rows, HIDDEN)
        parts = [((place * 7 + s * 5 + number) % 9 - 4).to(dtype) for s in range(world)]
        mine, total = parts[group.rank].clone(), sum(parts[1:], parts[0])
        if number % 3 == 0:
            got = group.all_reduce(mine)
        elif number % 3 == 1:
            _, got = group.reduce_add_norm(mine, None, weight, eps=1e-5, op=reduce_add_norm_torch)
        else:
            got, total = group.all_gather(mine), torch.stack(parts)
        wrong += int((got != total).sum())
        group.check()
        if job["fault"] == "killed" and number == job["rounds"] // 2:
            os.kill(os.getpid(), signal.SIGKILL)
    return wrong


def main(job: dict[str, Any]) -> None:
    rank, world, found = job["rank"], job["world_size"], {}
    timeout_s = job["timeout_s"]
    device = torch.device(job["device"])
    if device.type == "cuda":
        torch.cuda.set_device(0 if job["share_gpu"] else rank)
    if rank == 0:
        store = comm.host_store("127.0.0.1", world, 60.0)
        print(store.port, flush=True)
    else:
        store = comm.join_store("127.0.0.1", job["port"], world, 60.0)
    backend = "nccl" if device.type == "cuda" and not job["share_gpu"] else "gloo"
    group = comm.join_group(store, rank=rank, world_size=world, backend=backend, timeout_s=60.0, host="127.0.0.1")
    config = config_of(job)
    try:
        open_collectives(config, group, store, wait_s=timeout_s)
        found["opened"] = group.name
        if group.collectives is not None:
            opened = group.collectives
            if job["fault"] == "twice":
                group.collectives = AddsTwice(opened)
            certificate = Certificate(
                group, hidden_size=HIDDEN, max_rows=MAX_ROWS, max_gathered=MAX_ROWS, columns=COLUMNS,
                dtype=getattr(torch, job["dtype"]),
                device=device,
            )  # fmt: skip
            found["fault"] = certificate.fault()
            settle(config, group, opened, found["fault"])
        found["name"] = group.name
        if group.collectives is not None:
            found["wrong"] = rounds(group, job, device)
    except CollectiveError as error:
        found["error"] = describe(error)
    print(json.dumps(found), flush=True)
    if job["all_live"]:
        group.gather_on_host(torch.zeros(1))  # nobody leaves while another still joins
    os._exit(0)  # a peer may be gone, and the group cannot be left


def run(
    world_size: int, *, device: str, faults: dict[int, str] | None = None, **job: Any
) -> list[dict[str, Any] | None]:
    """What each rank found, None for one that was killed."""
    ranks: list[subprocess.Popen[str]] = []
    base = {"device": device, "world_size": world_size, "share_gpu": False, "collectives": "fused", "timeout_s": 20.0,
            "rounds": 60, "dtype": "float32", **job}  # fmt: skip
    try:
        for rank in range(world_size):
            port = int(ranks[0].stdout.readline()) if rank == 1 and ranks[0].stdout else (base.get("port") or 0)
            base["port"] = port
            line = json.dumps(
                base
                | {
                    "rank": rank,
                    "fault": (faults or {}).get(rank, ""),
                    "all_live": "killed" not in (faults or {}).values(),
                }
            )
            command = [sys.executable, str(Path(__file__)), line]
            ranks.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        found = []
        for process in ranks:
            out, errors = process.communicate(timeout=150)
            lines = out.splitlines()
            if process.returncode == -signal.SIGKILL:
                found.append(None)
                continue
            assert process.returncode == 0, errors
            found.append(json.loads(lines[-1]) | {"log": errors})
        return found
    finally:
        for process in ranks:
            process.kill()
            process.wait()


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO)
    main(json.loads(sys.argv[1]))
