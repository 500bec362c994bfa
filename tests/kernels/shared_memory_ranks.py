"""The rank processes of test_shared_memory.py. A rank answers on its pipe: ("attached", pid), then its result."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection

import torch

from dist_vlm.kernels.shared_memory import SharedMemoryGroup

HIDDEN = 768


def call(group: SharedMemoryGroup, what: str, rows: int) -> torch.Tensor:
    """One collective; the sum of what the ranks give is world_size * (world_size + 1) / 2 everywhere."""
    given = torch.full((rows, HIDDEN), float(group.rank + 1), dtype=torch.bfloat16)
    if what == "reduce_add_norm":
        weight = torch.ones(HIDDEN, dtype=torch.bfloat16)
        return group.reduce_add_norm(given, None, weight, eps=0.0)[1]
    if what == "all_gather":
        return group.all_gather(given).sum(0)
    return group.all_reduce(given)


def loop(group: SharedMemoryGroup, what: str, rows: int, answers: Connection) -> None:
    """Calls until a call fails; answers with the error, how long that call took, and what the next call says."""
    expected = group.world_size * (group.world_size + 1) / 2
    while True:
        began = time.monotonic()
        try:
            result = call(group, what, rows)
        except RuntimeError as error:
            taken = time.monotonic() - began
            try:
                call(group, "all_gather", 1)
            except RuntimeError as refused:
                answers.send((type(error).__name__, str(error), taken, str(refused)))
            return
        if not bool((result == expected).all()):
            answers.send(("wrong", str(result), 0.0, ""))
            return


def rounds(group: SharedMemoryGroup, count: int, answers: Connection) -> None:
    """Back-to-back calls of changing kind and size; answers with how many results were wrong."""
    expected = group.world_size * (group.world_size + 1) / 2
    wrong = 0
    for turn in range(count):
        what = ("all_reduce", "reduce_add_norm", "all_gather")[turn % 3]
        wrong += not bool((call(group, what, turn * turn % 37) == expected).all())
    answers.send(wrong)


def run_rank(rank: int, world_size: int, name: str, timeout_s: float, job: tuple, answers: Connection) -> None:
    torch.set_num_threads(1)
    group = SharedMemoryGroup(rank=rank, world_size=world_size, name=name, timeout_s=timeout_s)
    answers.send(("attached", os.getpid()))
    {"loop": loop, "rounds": rounds}[job[0]](group, *job[1:], answers)
    group.close()


def run_with_a_zombie(name: str, timeout_s: float, answers: Connection) -> None:
    """Rank 0; rank 1 is a child that is killed and not waited for, so its process number lives on."""
    torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        SharedMemoryGroup(rank=1, world_size=2, name=name, timeout_s=timeout_s)
        os.kill(os.getpid(), signal.SIGKILL)
    group = SharedMemoryGroup(rank=0, world_size=2, name=name, timeout_s=timeout_s)
    loop(group, "all_reduce", 1, answers)
    os.waitpid(child, 0)
