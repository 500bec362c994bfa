"""A GPU whose memory others hold, by what CUDA is made to say."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from dist_vlm.workers import free_memory
from dist_vlm.workers.free_memory import STEADY_S, await_release, check_room

from .test_runner import rank_config

GIB = 2**30
TOTAL = 100 * GIB


class Gpu:
    """Answers in place of torch.cuda. free_gib: at each look, the last one from then on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free_gib: list[float], *, kept_gib: float = 0) -> None:
        self._free = [int(gib * GIB) for gib in free_gib]
        self.now = 0.0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (self._look(), TOTAL))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: int((5 + kept_gib) * GIB))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5 * GIB)
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


def test_nobody_waits_for_memory_that_is_free(monkeypatch, config) -> None:
    gpu = Gpu(monkeypatch, [90])
    await_release(config)
    assert gpu.now == 0


def test_what_torch_keeps_for_the_process_is_free(monkeypatch, config) -> None:
    gpu = Gpu(monkeypatch, [70], kept_gib=20)
    await_release(config)
    check_room(90 * GIB, config)
    assert gpu.now == 0


def test_ranks_that_share_a_gpu_wait_for_their_part(monkeypatch, config) -> None:
    gpu = Gpu(monkeypatch, [45])
    await_release(dataclasses.replace(config, world_size=2, share_gpu=True))
    assert gpu.now == 0


def test_memory_of_processes_that_end_is_waited_for_as_long_as_it_comes(monkeypatch, config) -> None:
    slowly = [gib for gib in (3.0, 20.0, 50.0, 95.0) for _ in range(25)]
    gpu = Gpu(monkeypatch, slowly)
    await_release(config)
    assert gpu.now == pytest.approx(7.5), "no two and a half seconds were without a change"


def test_what_others_keep_is_not_waited_for(monkeypatch, config) -> None:
    gpu = Gpu(monkeypatch, [70.0])
    await_release(config)
    assert gpu.now == pytest.approx(STEADY_S, abs=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            "gpu_memory_utilization = 0.9: must be at most 0.7 beside what others hold: this GPU of 100.0 GiB has 55.5",
        ),
        ({"world_size": 2, "share_gpu": True}, "gpu_memory_utilization = 0.9: must be at most 0.51 beside"),
        ({"kv_cache_bytes": 75 * GIB}, "kv_cache_memory_gib = 75: this GPU of 100.0 GiB has 55.5 left, the weights"),
    ],
)
def test_a_cache_too_large_names_the_field(monkeypatch, config, changes, message) -> None:
    Gpu(monkeypatch, [55.5])
    changed = dataclasses.replace(config, **changes)
    with pytest.raises(MemoryError) as caught:
        check_room(75 * GIB, changed)
    assert str(caught.value).startswith(message)
    check_room(int(55.5 * GIB), changed)


@pytest.mark.gpu
def test_a_gpu_is_asked(config) -> None:
    await_release(dataclasses.replace(config, gpu_memory_utilization=0.01))
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    with pytest.raises(MemoryError, match="must be at most 0"):
        check_room(2 * total, config)
