from __future__ import annotations

import gc

import pytest
import torch

from dist_vlm.workers import graph
from dist_vlm.workers.comm import CollectiveCount
from dist_vlm.workers.graph import Recording

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def test_a_replay_does_the_work_anew() -> None:
    number = torch.ones(3, device=DEVICE)
    recording = Recording(lambda: number * 2, device=DEVICE)
    for value in (3.0, -1.0):
        number.fill_(value)
        assert recording.replay().tolist() == [2 * value] * 3
    assert gc.isenabled()


@pytest.mark.gpu
@torch.inference_mode()
def test_recordings_share_a_pool_and_leave_the_allocator_its_memory() -> None:
    pool = torch.cuda.graph_pool_handle()
    number = torch.ones(1 << 20, device=DEVICE)
    del number  # kept by the allocator, unless it is asked for it
    before = torch.cuda.memory_reserved()
    inputs = [torch.full((size,), 2.0, device=DEVICE) for size in (64, 32)]
    recordings = [Recording(lambda x=x: (x + 1) * x, device=DEVICE, pool=pool) for x in inputs]
    assert torch.cuda.memory_reserved() >= before
    assert [set(recording.replay().tolist()) for recording in recordings] == [{6.0}, {6.0}]


@pytest.mark.gpu
def test_work_that_fails_leaves_the_collector_on() -> None:
    calls = []

    def work() -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("the second time")
        return torch.ones(2, device=DEVICE)

    with pytest.raises(Exception, match="the second time|capture"):
        Recording(work, device=DEVICE)
    assert gc.isenabled()
    assert Recording(lambda: torch.ones(2, device=DEVICE), device=DEVICE).replay().tolist() == [1.0, 1.0]


class NoGraph:
    def replay(self) -> None:
        """Makes the work's calls where nobody counts them."""


def test_collectives_are_counted_when_they_are_made_and_not_when_they_are_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", NoGraph)
    monkeypatch.setattr(graph, "_capture", lambda _, work, pool: work())
    count = CollectiveCount()

    def work() -> None:
        count.all_reduce += 5
        count.all_gather += 1

    recording = Recording(work, device=torch.device("cuda"), count=count)
    assert (count.all_reduce, count.all_gather) == (5, 1), "the call before the recording"
    recording.replay()
    assert (count.all_reduce, count.all_gather) == (10, 2)
