"""Which way a rank's collectives go: over the peers' memory, shared memory or the process group."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_vlm.kernels.all_reduce.rules import Rules, parse_table
from dist_vlm.kernels.reduce_add_norm import reduce_add_norm_reference
from dist_vlm.kernels.shared_memory import SharedMemoryGroup
from dist_vlm.workers.collectives import CollectiveError, PeerPath, SharedMemoryPath
from dist_vlm.workers.comm import Communicator

EPS = 1e-5
# Floats of 4 bytes, at the edges 10 and 20 of them.
WAYS = {
    "reduce_add_norm": [(40, "one_shot", True), (80, "two_shot", True), (160, "two_shot", False), (None, "group", 0)],
    "all_reduce": [(40, "one_shot", False), (80, "two_shot", False), (None, "group", False)],
    "all_gather": [(40, "one_shot", False), (None, "group", False)],
}


def rules() -> Rules:
    names = ("up_to_bytes", "path", "fused")
    ops = {op: [dict(zip(names, (*way[:2], bool(way[2])), strict=True)) for way in ways] for op, ways in WAYS.items()}
    return parse_table(json.dumps({"ranks": {"2": ops}}), 2, "t.json")


class Peers:
    """Notes the calls; adds up and gathers two ranks that have the same."""

    def __init__(self, missing: list[int] | None = None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.buffers = SimpleNamespace(missing_ranks=lambda: missing)

    def all_reduce(self, tensor: torch.Tensor, *, shots: int) -> torch.Tensor:
        self.calls.append(("all_reduce", shots))
        return tensor.mul_(2)

    def reduce_add_norm(self, partial, residual, weight, *, eps, shots, **named):
        self.calls.append(("reduce_add_norm", shots))
        return reduce_add_norm_reference(partial, residual, weight, eps=eps, all_reduce=lambda tensor: tensor.mul_(2))

    def all_gather(self, part: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        self.calls.append(("all_gather", 1))
        if out is None:
            return torch.stack([part, part])
        return out.copy_(torch.cat([part, part], dim=1)[:, : out.shape[1]])


def peer_path(missing: list[int] | None = None) -> tuple[PeerPath, Peers]:
    peers = Peers(missing)
    return PeerPath(peers, rules(), timeout_s=2.5), peers


@pytest.mark.parametrize(("count", "shots"), [(1, 1), (10, 1), (11, 2), (20, 2), (21, 0), (500, 0)])
def test_peers_add_up_what_the_rules_give_them(count, shots) -> None:
    path, peers = peer_path()
    tensor = torch.arange(count, dtype=torch.float32)
    assert path.all_reduce(tensor) is bool(shots)
    assert peers.calls == ([("all_reduce", shots)] if shots else [])
    assert torch.equal(tensor, torch.arange(count) * (2.0 if shots else 1.0))


@pytest.mark.parametrize(("count", "shots"), [(10, 1), (11, 2), (20, 2), (21, 0), (40, 0), (41, 0)])
def test_peers_take_the_norm_where_it_is_fused(count, shots) -> None:
    path, peers = peer_path()
    partial, residual, weight = torch.ones(1, count), torch.arange(float(count)).view(1, count), torch.ones(count)
    answer = path.reduce_add_norm(partial, residual, weight, eps=EPS)
    assert peers.calls == ([("reduce_add_norm", shots)] if shots else [])
    if not shots:
        assert answer is None
        return
    assert answer is not None
    summed = residual + 2
    assert torch.equal(answer[1], summed)
    torch.testing.assert_close(answer[0], summed * torch.rsqrt(summed.square().mean() + EPS))


@pytest.mark.parametrize(("count", "taken"), [(10, True), (11, False)])
def test_peers_gather_what_the_rules_give_them(count, taken) -> None:
    path, peers = peer_path()
    part, out = torch.arange(float(count)).view(1, count), torch.full((1, 2 * count - 1), -1.0)
    gathered = path.all_gather(part)
    assert path.gather_columns(part, out) is taken
    assert len(peers.calls) == (2 if taken else 0)
    if taken:
        assert torch.equal(gathered, torch.stack([part, part]))
        assert out.tolist() == [[*range(count), *range(count - 1)]]
    else:
        assert gathered is None
        assert (out == -1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sizes_are_bytes(dtype) -> None:
    path, peers = peer_path()
    assert path.all_reduce(torch.ones(20, dtype=dtype))
    assert path.all_reduce(torch.ones(21, dtype=dtype))
    assert path.all_gather(torch.ones(20, dtype=dtype)) is not None
    assert path.all_gather(torch.ones(21, dtype=dtype)) is None
    assert peers.calls == [("all_reduce", 1), ("all_reduce", 2), ("all_gather", 1)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.float64])
def test_what_the_kernels_do_not_add_up_goes_to_the_group(dtype) -> None:
    path, peers = peer_path()
    one = torch.ones(1, 1, dtype=dtype)
    assert not path.all_reduce(one)
    assert path.all_gather(one) is None
    assert not path.gather_columns(one, torch.empty(1, 2))
    assert path.reduce_add_norm(one, None, torch.ones(1), eps=EPS) is None
    assert peers.calls == []


def test_a_sum_of_strided_numbers_goes_to_the_group() -> None:
    path, peers = peer_path()
    tensor = torch.ones(3, 3).T[:, :2]
    assert not tensor.is_contiguous()
    assert not path.all_reduce(tensor)
    assert peers.calls == []


def test_missing_ranks_are_named() -> None:
    peer_path()[0].check()
    for missing, words in (([1], "rank 1 took no part"), ([0, 3], "rank 0, 3 took no part")):
        with pytest.raises(CollectiveError, match=words + " in a collective within 2.5 s"):
            peer_path(missing)[0].check()


def test_a_peer_path_says_what_it_is_and_lets_go_of_the_memory() -> None:
    path, _ = peer_path()
    assert (path.name, path.is_recordable) == ("peer memory", True)
    assert [path.edges(op) for op in WAYS] == [[40, 80, 160], [40, 80], [40]]
    path.close()
    with pytest.raises(AttributeError):
        path.all_reduce(torch.ones(1))


def on_threads(work: Callable[[SharedMemoryPath, int], Any], *, ranks: int = 2, timeout_s: float = 60.0) -> list[Any]:
    """What `work(path, rank)` gives on each rank of a group over real shared memory."""
    name, results = f"dist-vlm-test-{uuid.uuid4().hex}", [None] * ranks

    def run(rank: int) -> None:
        segment = SharedMemoryGroup(rank=rank, world_size=ranks, name=name, timeout_s=timeout_s, capacity_bytes=4096)
        try:
            results[rank] = work(SharedMemoryPath(segment), rank)
        except Exception as error:
            results[rank] = error
        finally:
            segment.close()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not Path("/dev/shm", name).exists()
    return results


def test_shared_memory_adds_up_floats_and_whole_numbers() -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64)

    def work(path, rank):
        tensors = [(torch.arange(3000) % 50 + 100 * rank).to(dtype) for dtype in dtypes]
        return [path.all_reduce(tensor) for tensor in tensors], tensors

    for taken, tensors in on_threads(work):
        assert taken == [True] * len(dtypes)
        for dtype, tensor in zip(dtypes, tensors, strict=True):
            assert torch.equal(tensor, (torch.arange(3000) % 50 * 2 + 100).to(dtype)), dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.int16, torch.bool])
def test_shared_memory_leaves_other_sums_to_the_group_and_gathers_all(dtype) -> None:
    def work(path, rank):
        tensor = torch.full((2, 3), rank).to(dtype)
        norm = path.reduce_add_norm(tensor, None, tensor[0], eps=EPS)
        taken = path.all_reduce(tensor), path.gather_columns(tensor, torch.empty(2, 6)), norm
        return taken, tensor, path.all_gather(tensor)

    for rank, (taken, tensor, gathered) in enumerate(on_threads(work)):
        assert taken == (False, False, None)
        assert torch.equal(tensor, torch.full((2, 3), rank).to(dtype))
        assert torch.equal(gathered, torch.stack([torch.full((2, 3), rank).to(dtype) for rank in range(2)]))


def test_shared_memory_takes_the_norm() -> None:
    residual, weight = torch.linspace(-3, 3, 96).view(2, 48), torch.linspace(0.5, 2, 48)

    def work(path, rank):
        partial = torch.full((2, 48), float(1 + rank))
        normed, summed = path.reduce_add_norm(partial, residual, weight, eps=EPS)
        return normed, summed, summed is partial

    for normed, summed, in_place in on_threads(work):
        assert in_place
        torch.testing.assert_close(summed, residual + 3)
        scale = torch.rsqrt((residual + 3).square().mean(dim=1, keepdim=True) + EPS)
        torch.testing.assert_close(normed, (residual + 3) * scale * weight)


@pytest.mark.parametrize("op", ["all_reduce", "reduce_add_norm", "all_gather"])
def test_a_rank_that_leaves_is_named_by_the_others(op) -> None:
    calls = {
        "all_reduce": lambda path: path.all_reduce(torch.ones(4)),
        "reduce_add_norm": lambda path: path.reduce_add_norm(torch.ones(1, 4), None, torch.ones(4), eps=EPS),
        "all_gather": lambda path: path.all_gather(torch.ones(4)),
    }

    def work(path, rank):
        path.check()
        if rank == 1:
            path.close()
            return None
        return calls[op](path)

    first, gone, last = on_threads(work, ranks=3)
    assert gone is None
    for error in (first, last):
        assert type(error) is CollectiveError
        assert "rank 1" in str(error)
        assert str(error).startswith(op)


def test_a_shared_memory_path_says_what_it_is() -> None:
    path = SharedMemoryPath(SimpleNamespace())
    assert (path.name, path.is_recordable) == ("shared memory", False)
    edges = path.edges("all_reduce")
    assert edges == sorted(set(edges))
    assert edges[0] >= 1


# The communicator: its group is one of gloo with this process alone, which stands for both ranks of the collectives.


@pytest.fixture(scope="module")
def group(tmp_path_factory) -> Iterator[dist.ProcessGroup]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class Double:
    """Collectives of two ranks that have the same, for tensors of at most `most` elements."""

    name, is_recordable = "double", True

    def __init__(self, most: int) -> None:
        self.most, self.asked, self.closed = most, [], 0

    def _takes(self, op: str, tensor: torch.Tensor) -> bool:
        self.asked.append(op)
        return tensor.numel() <= self.most

    def all_reduce(self, tensor):
        takes = self._takes("all_reduce", tensor)
        if takes:
            tensor.mul_(2)
        return takes

    def reduce_add_norm(self, partial, residual, weight, *, eps, **named):
        if not self._takes("reduce_add_norm", partial):
            return None
        return reduce_add_norm_reference(partial, residual, weight, eps=eps, all_reduce=lambda tensor: tensor * 2)

    def all_gather(self, part):
        return torch.stack([part, part]) if self._takes("all_gather", part) else None

    def gather_columns(self, part, out):
        takes = self._takes("gather_columns", part)
        if takes:
            out.copy_(torch.cat([part, part], dim=1)[:, : out.shape[1]])
        return takes

    def check(self):
        raise CollectiveError("rank 1 is late")

    def close(self):
        self.closed += 1


class GroupCalls:
    """Takes the place of torch's own collectives, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        monkeypatch.setattr(dist, "all_reduce", self._all_reduce)
        monkeypatch.setattr(dist, "all_gather", self._all_gather)

    def _all_reduce(self, tensor, group=None):
        self.made.append("all_reduce")
        tensor.mul_(2)

    def _all_gather(self, parts, tensor, group=None):
        self.made.append("all_gather")
        for part in parts:
            part.copy_(tensor)


def counts(comm: Communicator) -> tuple[int, int]:
    return comm.count.all_reduce, comm.count.all_gather


@pytest.mark.parametrize(("most", "own"), [(100, True), (0, False), (None, False)])
def test_each_collective_is_made_once_and_counted_once(monkeypatch, most, own) -> None:
    made = GroupCalls(monkeypatch).made
    collectives = None if most is None else Double(most)
    comm = Communicator(0, 2, collectives=collectives)
    part, weight = torch.tensor([[1.0, 3.0, 5.0]]), torch.ones(3)

    tensor = part.clone()
    assert comm.all_reduce(tensor) is tensor
    assert tensor.tolist() == [[2, 6, 10]]
    assert counts(comm) == (1, 0)
    assert made == ([] if own else ["all_reduce"])

    normed, summed = comm.reduce_add_norm(part.clone(), part, weight, eps=EPS, op=reduce_add_norm_reference)
    assert summed.tolist() == [[3, 9, 15]]
    torch.testing.assert_close(normed, summed / (summed.square().mean() + EPS).sqrt())
    assert counts(comm) == (2, 0)
    assert made == ([] if own else ["all_reduce"] * 2)

    assert comm.all_gather(part).tolist() == [[[1, 3, 5]], [[1, 3, 5]]]
    assert counts(comm) == (2, 1)
    out = torch.full((1, 5), -1.0)
    assert comm.gather_columns(part, out) is out
    assert out.tolist() == [[1, 3, 5, 1, 3]]
    assert counts(comm) == (2, 2)
    assert made == ([] if own else ["all_reduce"] * 2 + ["all_gather"] * 2)


@pytest.mark.parametrize("most", [100, 0])
@pytest.mark.parametrize("width", [1, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gathered_columns_are_those_of_cat_cut_off(monkeypatch, most, width, dtype) -> None:
    GroupCalls(monkeypatch)
    comm = Communicator(0, 2, collectives=Double(most))
    part = torch.arange(12.0).view(3, 4).to(torch.float16)
    out = torch.empty(3, width, dtype=dtype)
    comm.gather_columns(part, out)
    assert torch.equal(out, torch.cat([part, part], dim=1)[:, :width].to(dtype))


def test_the_group_names_itself_and_is_not_recordable(group) -> None:
    comm = Communicator(0, 2, group)
    assert (comm.name, comm.is_recordable) == ("gloo", False)
    comm.check()
    comm.collectives = Double(0)
    assert (comm.name, comm.is_recordable) == ("double", True)
    comm.collectives.is_recordable = False
    assert not comm.is_recordable
    with pytest.raises(CollectiveError, match="rank 1 is late"):
        comm.check()


def test_what_the_host_gathers_goes_through_the_group_alone(group) -> None:
    comm = Communicator(0, 1, group, collectives=Double(100))
    found = comm.gather_on_host(torch.tensor([3, 4], dtype=torch.uint8))
    assert found.tolist() == [[3, 4]]
    assert comm.collectives.asked == []
    assert counts(comm) == (0, 0)


def test_close_closes_the_collectives_once() -> None:
    collectives = Double(0)
    comm = Communicator(0, 2, collectives=collectives)
    comm.close()
    comm.close()
    assert collectives.closed == 1
    assert comm.collectives is None
