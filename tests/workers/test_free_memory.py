"""A GPU whose memory others hold, by what CUDA is made to say."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from dist_vlm.workers import free_memory, runner, wire, worker
from dist_vlm.workers.comm import single_rank
from dist_vlm.workers.free_memory import STEADY_S, await_release, check_room
from dist_vlm.workers.memory import arena_bytes
from dist_vlm.workers.worker import Worker

from .test_runner import rank_config

GIB = 2**30
TOTAL = 100 * GIB


class Gpu:
    """Answers in place of torch.cuda, of a GPU of 100 GiB.

    free_gib: at each look, the last one from then on. kept_gib: what torch keeps and does not use. held_gib: what this
    process has allocated.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, free_gib: list[float], *, kept_gib: float = 0, held_gib: float = 0
    ) -> None:
        self._free = [int(gib * GIB) for gib in free_gib]
        self.now = 0.0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (self._look(), TOTAL))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: int((held_gib + kept_gib) * GIB))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: int(held_gib * GIB))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=TOTAL))
        monkeypatch.setattr(free_memory.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(free_memory.time, "sleep", self._sleep)

    def _look(self) -> int:
        return self._free.pop(0) if len(self._free) > 1 else self._free[0]

    def _sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def config(tiny_checkpoint):
    return dataclasses.replace(rank_config(tiny_checkpoint), kv_cache_bytes=None, gpu_memory_utilization=0.9)


@pytest.mark.parametrize(
    ("changes", "gpu"),
    [
        ({}, {"free_gib": [90]}),
        ({}, {"free_gib": [70], "kept_gib": 20}),
        # Another engine of this process, which is part of the share.
        ({}, {"free_gib": [50], "held_gib": 45}),
        ({"world_size": 2, "share_gpu": True}, {"free_gib": [45]}),
        ({"kv_cache_bytes": 10 * GIB}, {"free_gib": [12]}),
        # A process cannot have all of it: what CUDA itself takes is gone.
        ({"gpu_memory_utilization": 1.0}, {"free_gib": [99.2]}),
    ],
)
def test_nobody_waits_for_memory_that_is_free(monkeypatch, config, changes, gpu) -> None:
    answers = Gpu(monkeypatch, **gpu)
    await_release(dataclasses.replace(config, **changes))
    assert answers.now == 0


def test_memory_of_processes_that_end_is_waited_for_as_long_as_it_comes(monkeypatch, config) -> None:
    slowly = [gib for gib in (3.0, 20.0, 50.0, 95.0) for _ in range(25)]
    gpu = Gpu(monkeypatch, slowly)
    await_release(config)
    assert gpu.now == pytest.approx(7.5), "a change every two and a half seconds"


def test_what_others_keep_is_not_waited_for(monkeypatch, config) -> None:
    gpu = Gpu(monkeypatch, [70.0])
    await_release(config)
    assert gpu.now == pytest.approx(STEADY_S, abs=0.2)


LEFT = "of this GPU's 100.0 GiB 55.5 are left"
SHARE = f"gpu_memory_utilization = 0.9: 21.50 GiB are missing, {LEFT}"
SIZE = f"kv_cache_memory_gib or num_gpu_blocks_override asks for 75.00 GiB: {LEFT}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # A GiB is a hundredth of the GPU.
        ({}, f"{SHARE}; must be at most 0.68 beside what others hold"),
        ({"world_size": 2, "share_gpu": True}, SHARE),
        ({"kv_cache_bytes": 75 * GIB}, f"{SIZE}; must be at most 53.50, for 2.00 are needed beside it"),
    ],
)
def test_a_cache_too_large_names_the_field_and_a_value_that_fits(monkeypatch, config, changes, message) -> None:
    Gpu(monkeypatch, [55.5])
    changed = dataclasses.replace(config, **changes)
    with pytest.raises(MemoryError) as caught:
        check_room(75 * GIB, 2 * GIB, changed)
    assert str(caught.value) == message
    check_room(int(53.5 * GIB), 2 * GIB, changed)


def test_a_rank_waits_before_it_meets_the_others(monkeypatch, config) -> None:
    calls = []
    monkeypatch.setattr(worker, "hold_gpu", lambda: None)
    monkeypatch.setattr(worker, "_gpu_ordinal", lambda: 0)
    monkeypatch.setattr(Worker, "_enter_thread", lambda self: None)
    monkeypatch.setattr(free_memory, "await_release", calls.append)
    gpu = dataclasses.replace(config, device="cuda")
    Worker(wire.encode(gpu), "tests.workers.test_free_memory:Gpu").prepare("127.0.0.1", 10)
    Worker(wire.encode(config), "tests.workers.test_free_memory:Gpu").prepare("127.0.0.1", 10)
    assert calls == [gpu]


def test_a_cache_is_not_allocated_where_there_is_no_room(monkeypatch, config) -> None:
    calls = []

    def refused(*arguments) -> None:
        calls.append(arguments)
        raise MemoryError("no room")

    ready = dataclasses.replace(config, kv_cache_bytes=1 << 20)
    rank = runner.Runner(ready, single_rank())
    report = rank.load()
    rank.device = torch.device("cuda")
    monkeypatch.setattr(runner, "check_room", refused)
    with pytest.raises(MemoryError, match="no room"):
        rank.allocate(7)
    workspace = rank.ops.workspace_bytes
    assert calls == [(7 * report.kv_block_bytes, arena_bytes(rank.spec, ready, rank.dtype, workspace), ready)]


@pytest.mark.gpu
def test_a_gpu_is_asked(config) -> None:
    await_release(dataclasses.replace(config, gpu_memory_utilization=0.01))
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    with pytest.raises(MemoryError, match="must be at most 0 "):
        check_room(2 * total, 0, config)
