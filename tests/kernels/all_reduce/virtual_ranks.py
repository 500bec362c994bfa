"""Ranks of one machine without a process group: streams of one GPU, or processes where Triton interprets.

Their buffers lie in plain memory that all of them see.
"""

from __future__ import annotations

import io
import mmap
import os
import select
import signal
import struct
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from dist_vlm.kernels.all_reduce.peer_buffers import memory_bytes, view
from dist_vlm.kernels.all_reduce.peer_collectives import PeerCollectives

# A GPU holds the programs of eight ranks at once.
PROGRAMS = 8
# Longer than any test waits for a slow rank, on a machine that is busy with other tests.
LOOKS = 20_000_000 if torch.cuda.is_available() else 300_000
DEADLINE_S = 200


@dataclass
class Rank:
    """What a job of a rank works with.

    inputs: what the job has put on the device, in the order of its calls, where it has run before.
    """

    collectives: PeerCollectives
    generator: torch.Generator
    inputs: list[torch.Tensor] = field(default_factory=list)
    num_put: int = 0
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def number(self) -> int:
        return self.collectives.buffers.rank

    @property
    def device(self) -> torch.device:
        return self.collectives.buffers.device

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device. A GPU may be asked for one from the host only before any rank waits for another: until
        it is made, no other rank of the process gets to launch anything."""
        if self.device.type == "cpu":
            return tensor.clone()
        if self.num_put == len(self.inputs):
            self.inputs.append(tensor.to(self.device))
        self.num_put += 1
        return self.inputs[self.num_put - 1].clone()

    def nap(self, most_us: int) -> None:
        """Lets the rank be late, by up to so many microseconds."""
        amount = int(torch.randint(most_us + 1, (1,), generator=self.generator))
        if self.device.type == "cuda":
            torch.cuda._sleep(amount * 1500)
        else:
            time.sleep(amount * 1e-6)


Job = Callable[[Rank], Any]


def run(
    world_size: int, job: Job, *, capacity: int = 1 << 20, looks: int = LOOKS, programs: int = PROGRAMS
) -> list[Any]:
    """What `job` returns on each rank, in rank order, on the CPU."""
    start = _on_streams if torch.cuda.is_available() else _in_processes
    return start(world_size, job, capacity=capacity, looks=looks, programs=programs)


def _rank(memory: torch.Tensor, addresses: list[int], rank: int, looks: int, programs: int) -> Rank:
    buffers = view(memory, addresses, rank=rank)
    generator = torch.Generator().manual_seed(rank)
    # As ranks that share a GPU do: what starts early could take the room that another rank's call needs.
    collectives = PeerCollectives(buffers, max_looks=looks, max_programs=programs, starts_early=False)
    return Rank(collectives, generator)


def _on_streams(world_size: int, job: Job, *, capacity: int, looks: int, programs: int) -> list[Any]:
    words = memory_bytes(capacity) // 4
    memories = [torch.empty(words, dtype=torch.int32, device="cuda") for _ in range(world_size)]
    addresses = [memory.data_ptr() for memory in memories]
    ranks = [_rank(memory, addresses, rank, looks, programs) for rank, memory in enumerate(memories)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in ranks]

    def run_one(rank: Rank) -> Any:
        with torch.cuda.stream(streams[rank.number]):
            return job(rank)

    # To load a kernel or to allocate memory the device must be idle, which it is not while a rank waits for another. So
    # each rank does all it will do once alone, waiting for nobody; what it computes means nothing.
    alone = torch.empty(words, dtype=torch.int32, device="cuda")
    for rank in ranks:
        rehearsing = _rank(alone, [alone.data_ptr()] * world_size, rank.number, 1, programs)
        rehearsing.inputs = rank.inputs
        run_one(rehearsing)
        torch.cuda.synchronize()
    # Threads: a copy from the host waits for the kernels before it, and these for those of the other ranks.
    with ThreadPoolExecutor(world_size) as pool:
        results = list(pool.map(run_one, ranks))
    torch.cuda.synchronize()
    return [_to_host(result) for result in results]


def _to_host(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result.cpu()
    if isinstance(result, (list, tuple)):
        return type(result)(_to_host(part) for part in result)
    return result() if callable(result) else result


def _in_processes(world_size: int, job: Job, *, capacity: int, looks: int, programs: int) -> list[Any]:
    words = memory_bytes(capacity) // 4
    shared = mmap.mmap(-1, 4 * words * world_size)
    everything = torch.frombuffer(shared, dtype=torch.int32)
    memories = list(everything.view(world_size, words))
    addresses = [memory.data_ptr() for memory in memories]
    ready = [memory.fill_(-0x7FFF8000) for memory in memories]  # before any rank sends
    assert len(ready) == world_size
    pipes, children = [], []
    for rank in range(world_size):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(reading)
                torch.set_num_threads(1)
                _answer(writing, lambda rank=rank: _run_one(memories, addresses, rank, looks, programs, job))
                status = 0
            finally:
                os._exit(status)
        os.close(writing)
        pipes.append(reading)
        children.append(child)
    try:
        return [_read(pipe, rank) for rank, pipe in enumerate(pipes)]
    finally:
        for pipe in pipes:
            os.close(pipe)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _run_one(memories: list[torch.Tensor], addresses: list[int], rank: int, looks: int, programs: int, job: Job) -> Any:
    # Filled already, and a peer may have sent: `view` fills memory of its own.
    other = _rank(torch.empty_like(memories[rank]), addresses, rank, looks, programs)
    return _to_host(job(other))


def _answer(pipe: int, call: Callable[[], Any]) -> None:
    try:
        answer = (True, call())
    except BaseException:
        answer = (False, traceback.format_exc())
    out = io.BytesIO()
    torch.save(answer, out)
    with os.fdopen(pipe, "wb") as stream:
        stream.write(struct.pack("q", out.getbuffer().nbytes) + out.getvalue())


def _read(pipe: int, rank: int) -> Any:
    end, held = time.monotonic() + DEADLINE_S, b""
    while len(held) < 8 or len(held) < 8 + struct.unpack("q", held[:8])[0]:
        ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError(f"rank {rank} did not answer in {DEADLINE_S} s")
        piece = os.read(pipe, 1 << 20)
        if not piece:
            raise RuntimeError(f"rank {rank} ended without an answer")
        held += piece
    good, answer = torch.load(io.BytesIO(held[8:]), weights_only=False)
    if not good:
        raise RuntimeError(f"rank {rank}: {answer}")
    return answer
