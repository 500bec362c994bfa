"""Collectives over shared memory: ranks as threads of this process for their results, processes for their ends."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_vlm.kernels.reduce_add_norm import reduce_add_norm_cpp, reduce_add_norm_reference
from dist_vlm.kernels.shared_memory import MAX_CAPACITY, MAX_RANKS, PeerLost, SharedMemoryGroup

from . import shared_memory_ranks

ROOT = Path(__file__).resolve().parents[2]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
EPS = 1e-5
NEVER = 1 << 60
SHOTS = {"one shot": NEVER, "two shots": 0}


def new_name() -> str:
    return f"dist-vlm-test-{uuid.uuid4().hex}"


def is_left(name: str) -> bool:
    return Path("/dev/shm", name).exists()


def on_ranks(world_size: int, work: Callable[[SharedMemoryGroup], Any], **options: Any) -> list[Any]:
    """What `work` returns or raises on each rank."""
    name = new_name()
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            group = SharedMemoryGroup(rank=rank, world_size=world_size, name=name, **{"timeout_s": 60.0} | options)
            try:
                results[rank] = work(group)
            finally:
                group.close()
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not is_left(name)
    assert name not in Path("/proc/self/maps").read_text()
    return results


def succeed(results: list[Any]) -> list[Any]:
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + sum(shape))
    if dtype.is_floating_point:
        return (3 * torch.randn(shape, generator=generator)).to(dtype)
    return torch.randint(-(1 << 20), 1 << 20, shape, generator=generator).to(dtype)


def sum_in_rank_order(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].float() if parts[0].is_floating_point() else parts[0].clone()
    for other in parts[1:]:
        total = total + other.to(total.dtype)
    return total.to(parts[0].dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("shots", SHOTS)
@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_all_reduce_sums_in_rank_order(world_size, shots) -> None:
    """Sizes above the slot go in pieces; below and above the size of a cache line, and none at all."""
    shapes = [(0,), (1,), (7,), (769,), (5125,), (3, 0), (2, 3, 5), (300, 17), ()]
    dtypes = (*FLOATS, torch.int32, torch.int64)

    def work(group: SharedMemoryGroup) -> list[torch.Tensor]:
        group.set_crossover(SHOTS[shots], SHOTS[shots])
        results = []
        for shape, dtype in itertools.product(shapes, dtypes):
            tensor = part(group.rank, shape, dtype)
            result = group.all_reduce(tensor)
            assert result is tensor
            results.append(result)
        return results

    ranks = succeed(on_ranks(world_size, work, capacity_bytes=4096))
    for case, results in zip(itertools.product(shapes, dtypes), zip(*ranks, strict=True), strict=True):
        parts = [part(rank, *case) for rank in range(world_size)]
        for result in results:
            assert same_bits(result, sum_in_rank_order(parts)), case
        if parts[0].is_floating_point():
            exact = torch.stack(parts).double().sum(0)
            tolerance = TOLERANCE[case[1]]
            torch.testing.assert_close(results[0].double(), exact, atol=10 * tolerance, rtol=tolerance)


def test_all_reduce_takes_tensors_that_are_not_contiguous() -> None:
    def work(group: SharedMemoryGroup) -> tuple[torch.Tensor, torch.Tensor]:
        whole = part(group.rank, (31, 64), torch.float32)
        view = whole.T[3:40]
        assert group.all_reduce(view) is view
        return whole, view

    parts = [part(rank, (31, 64), torch.float32) for rank in range(3)]
    for rank, (whole, view) in enumerate(succeed(on_ranks(3, work))):
        assert same_bits(view, sum_in_rank_order([part.T[3:40] for part in parts]))
        assert same_bits(whole[:, :3], parts[rank][:, :3]) and same_bits(whole[:, 40:], parts[rank][:, 40:])


@pytest.mark.parametrize("dtype", FLOATS)
def test_all_reduce_keeps_what_is_not_a_number(dtype) -> None:
    infinity, nan = float("inf"), float("nan")
    given = torch.tensor([[infinity, -infinity, nan, 1.0, infinity], [-infinity, -infinity, 1.0, nan, 1.0]] * 20)

    def work(group: SharedMemoryGroup) -> torch.Tensor:
        return group.all_reduce(given[group.rank :: 2].to(dtype))

    first, second = succeed(on_ranks(2, work))
    expected = torch.tensor([nan, -infinity, nan, nan, infinity]).expand(20, 5).to(dtype)
    assert torch.equal(first.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert same_bits(first, second)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_all_gather_stacks_in_rank_order(world_size) -> None:
    shapes = [(0,), (), (1,), (769,), (4, 3, 5), (2, 5125)]
    dtypes = (torch.bool, torch.uint8, torch.int64, torch.float64, torch.bfloat16, torch.float32)

    def given(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return part(rank, shape, torch.int64).remainder(251).to(dtype)

    def work(group: SharedMemoryGroup) -> list[torch.Tensor]:
        cases = itertools.product(shapes, dtypes)
        gathered = [group.all_gather(given(group.rank, *case)) for case in cases]
        return [*gathered, group.all_gather(given(group.rank, (6, 8), torch.float32).T)]

    ranks = succeed(on_ranks(world_size, work, capacity_bytes=1024))
    expected = [
        torch.stack([given(rank, *case) for rank in range(world_size)]) for case in itertools.product(shapes, dtypes)
    ]
    expected.append(torch.stack([given(rank, (6, 8), torch.float32).T for rank in range(world_size)]))
    for results in ranks:
        assert all(same_bits(*pair) for pair in zip(results, expected, strict=True))


@pytest.mark.parametrize("shots", SHOTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_reduce_add_norm_has_the_bits_of_its_parts(world_size, dtype, shots) -> None:
    """The last two shapes: rows in pieces, and rows larger than a slot."""
    shapes = [(0, 64), (1, 1), (1, 769), (2, 16), (5, 769), (300, 33), (9, 5125)]

    def inputs(rank: int, shape: tuple[int, int], with_residual: bool) -> tuple:
        residual = part(50, shape[::-1], dtype).T if with_residual else None  # rows that are not dense
        return part(rank, shape, dtype), residual, part(51, shape[1:], dtype)

    cases = list(itertools.product(shapes, (True, False)))

    def work(group: SharedMemoryGroup) -> list[tuple]:
        group.set_crossover(SHOTS[shots], SHOTS[shots])
        results = []
        for shape, with_residual in cases:
            partial, residual, weight = inputs(group.rank, shape, with_residual)
            normed, summed = group.reduce_add_norm(partial, residual, weight, eps=EPS)
            assert summed.data_ptr() == partial.data_ptr()
            again = inputs(group.rank, shape, with_residual)
            results.append((normed, summed, *reduce_add_norm_cpp(*again, eps=EPS, all_reduce=group.all_reduce)))
        return results

    ranks = succeed(on_ranks(world_size, work, capacity_bytes=8192))
    for i, (shape, with_residual) in enumerate(cases):
        total = sum_in_rank_order([part(rank, shape, dtype) for rank in range(world_size)])
        args = inputs(0, shape, with_residual)
        normed, summed = reduce_add_norm_reference(*args, eps=EPS, all_reduce=lambda _, total=total: total.clone())
        for results in ranks:
            fused_normed, fused_summed, unfused_normed, unfused_summed = results[i]
            assert same_bits(fused_summed, unfused_summed) and same_bits(fused_normed, unfused_normed), shape
            assert same_bits(fused_summed, summed) and same_bits(fused_normed, ranks[0][i][0]), shape
            torch.testing.assert_close(fused_normed, normed, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("rows", range(1, 301, 23))
def test_reduce_add_norm_of_any_number_of_rows(rows) -> None:
    """At the measured crossover: the ways are chosen as they are in use."""

    def work(group: SharedMemoryGroup) -> tuple:
        partial, weight = part(group.rank, (rows, 96), torch.bfloat16), part(9, (96,), torch.bfloat16)
        return group.reduce_add_norm(partial, part(8, (rows, 96), torch.bfloat16), weight, eps=EPS)

    total = sum_in_rank_order([part(rank, (rows, 96), torch.bfloat16) for rank in range(3)])
    for _, summed in succeed(on_ranks(3, work)):
        assert same_bits(summed, (part(8, (rows, 96), torch.bfloat16).float() + total.float()).bfloat16())


@pytest.mark.timeout(200)
@pytest.mark.parametrize("world_size", [2, 4])
def test_calls_back_to_back_with_delays(world_size) -> None:
    """Ranks that wait for one another at random, with ranks more than cores among them: nothing is read too late."""

    def work(group: SharedMemoryGroup) -> int:
        shared, own = random.Random(1), random.Random(group.rank)
        wrong = 0
        for turn in range(3000):
            size, threshold = shared.choice((1, 63, 500, 3000)), shared.choice((0, NEVER))
            group.set_crossover(threshold, threshold)
            tensor = torch.full((size,), float(group.rank + turn % 50))
            if own.random() < 0.02 or (group.rank == 1 and turn % 500 == 0):
                time.sleep(own.random() * 2e-3)
            if shared.random() < 0.3:
                gathered = group.all_gather(tensor)
                wrong += gathered[:, -1].tolist() != [float(rank + turn % 50) for rank in range(world_size)]
            else:
                total = sum(rank + turn % 50 for rank in range(world_size))
                wrong += not bool((group.all_reduce(tensor) == total).all())
        return wrong

    assert succeed(on_ranks(world_size, work, capacity_bytes=2048)) == [0] * world_size


def test_a_rank_that_stays_away_is_named_by_the_deadline() -> None:
    done = threading.Event()

    def work(group: SharedMemoryGroup) -> tuple:
        if group.rank == 1:
            assert done.wait(30.0)
            with pytest.raises(PeerLost) as raised:
                group.all_reduce(torch.ones(3))
            return str(raised.value)
        began = time.monotonic()
        with pytest.raises(PeerLost) as raised:
            group.all_reduce(torch.ones(3))
        taken = time.monotonic() - began
        with pytest.raises(PeerLost) as again:
            group.all_gather(torch.ones(3))
        done.set()
        return str(raised.value), taken, str(again.value)

    first, absent, third = succeed(on_ranks(3, work, timeout_s=0.6))
    for message, taken, again in (first, third):
        assert message == again == "all_reduce: rank 1 did not arrive in 0.6 s"
        assert 0.5 < taken < 5.0
    assert absent == "all_reduce: rank 1 (this rank) did not arrive in 0.6 s"


def test_a_rank_that_closes_is_named_at_once() -> None:
    def work(group: SharedMemoryGroup) -> tuple:
        group.all_reduce(torch.ones(1))
        if group.rank == 0:
            group.close()
            with pytest.raises(RuntimeError, match="all_reduce: the group is closed"):
                group.all_reduce(torch.ones(1))
            with pytest.raises(RuntimeError, match="all_gather: the group is closed"):
                group.all_gather(torch.ones(1))
            with pytest.raises(RuntimeError, match="set_crossover: the group is closed"):
                group.set_crossover(0, 0)
            return None
        began = time.monotonic()
        with pytest.raises(PeerLost, match="reduce_add_norm: rank 0 closed the group"):
            group.reduce_add_norm(torch.ones(1, 4), None, torch.ones(4), eps=EPS)
        return time.monotonic() - began

    assert succeed(on_ranks(2, work))[1] < 5.0


@pytest.mark.parametrize(
    "calls",
    [
        (lambda group: group.all_reduce(torch.ones(5)), lambda group: group.all_reduce(torch.ones(6))),
        (lambda group: group.all_reduce(torch.ones(4)), lambda group: group.all_gather(torch.ones(4))),
        (lambda group: group.all_reduce(torch.ones(4)), lambda group: group.all_reduce(torch.ones(4).half())),
        (lambda group: group.all_reduce(torch.ones(4)), lambda group: group.all_reduce(torch.ones(90_000))),
    ],
)
def test_ranks_that_call_different_things_are_told(calls) -> None:
    results = on_ranks(2, lambda group: calls[group.rank](group))
    assert all(isinstance(result, RuntimeError) for result in results)
    assert all("made another call or gave another size" in str(result) for result in results)


def test_ranks_that_do_not_attach_are_named() -> None:
    name = new_name()
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=f"{name}: ranks 1, 2 did not attach in 0.3 s"):
        SharedMemoryGroup(rank=0, world_size=3, name=name, timeout_s=0.3)
    assert time.monotonic() - began < 5.0
    assert not is_left(name)
    with pytest.raises(TimeoutError, match=f"{name}: rank 0 did not attach in 0.3 s"):
        SharedMemoryGroup(rank=2, world_size=3, name=name, timeout_s=0.3)
    assert not is_left(name)


def test_those_who_wait_for_a_rank_leave_together() -> None:
    """Rank 1 has more patience, and a rank that comes later finds nothing to attach to."""
    name = new_name()
    errors: dict[int, Exception] = {}
    began = time.monotonic()

    def attach(rank: int) -> None:
        try:
            SharedMemoryGroup(rank=rank, world_size=3, name=name, timeout_s=0.4 if rank == 0 else 100.0)
        except Exception as error:
            errors[rank] = error

    threads = [threading.Thread(target=attach, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < 10.0
    assert all(
        isinstance(error, TimeoutError) and "rank 2 did not attach in 0.4 s" in str(error) for error in errors.values()
    )
    assert set(errors) == {0, 1} and not is_left(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 1}, "world_size is 1, must be 2 to 32"),
        ({"world_size": 33}, "world_size is 33, must be 2 to 32"),
        ({"world_size": 2.0}, "world_size is 2.0, must be 2 to 32"),
        ({"rank": -1}, "rank is -1, must be 0 to 1"),
        ({"rank": 2}, "rank is 2, must be 0 to 1"),
        ({"rank": True}, "rank is True, must be 0 to 1"),
        ({"name": ""}, "name is '', must be 1 to 200 letters"),
        ({"name": "../x"}, "name is '../x', must be 1 to 200 letters"),
        ({"name": "x" * 201}, "must be 1 to 200 letters"),
        ({"timeout_s": 0}, "timeout_s is 0, must be above 0"),
        ({"timeout_s": float("nan")}, "timeout_s is nan, must be above 0"),
        ({"timeout_s": 1e9}, "timeout_s is 1000000000.0, must be above 0, at most 86400"),
        ({"timeout_s": "1"}, "timeout_s is '1', must be above 0"),
        ({"capacity_bytes": 0}, "capacity_bytes is 0, must be 64 to 1073741824"),
        ({"capacity_bytes": 100}, "capacity_bytes is 100, must be a multiple of 64"),
    ],
)
def test_wrong_arguments_are_named(options, message) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        SharedMemoryGroup(**{"rank": 0, "world_size": 2, "name": "never", "timeout_s": 1.0} | options)


def attach_two(first: dict[str, Any], second: dict[str, Any]) -> list[Exception]:
    """The errors of rank 0 with `first` and, a little later, another rank with `second`."""
    errors = []

    def attach(options: dict[str, Any]) -> None:
        try:
            SharedMemoryGroup(**options)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=attach, args=(first,))
    thread.start()
    while not is_left(first["name"]):
        time.sleep(0.001)
    attach(second)
    thread.join()
    return errors


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"rank": 1, "world_size": 3}, "world_size and capacity_bytes are 3 and 524288, must be those of rank 0"),
        ({"rank": 1, "capacity_bytes": 64}, "must be those of rank 0, which has 524288 for one of them"),
        ({"rank": 0}, "must be of no segment that exists"),
    ],
)
def test_ranks_that_do_not_fit_together_are_refused(second, message) -> None:
    name = new_name()
    first = {"rank": 0, "world_size": 2, "name": name, "timeout_s": 1.0}
    refused, waited = attach_two(first, first | second)
    assert isinstance(refused, ValueError) and message in str(refused)
    assert isinstance(waited, TimeoutError) and "rank 1 did not attach" in str(waited)
    assert not is_left(name)


def test_a_rank_that_is_taken_is_refused() -> None:
    name = new_name()
    first = {"rank": 0, "world_size": 3, "name": name, "timeout_s": 1.0}
    threads_errors: list[Exception] = []

    def attach_rank_1() -> None:
        threads_errors.extend(attach_two(first, first | {"rank": 1}))

    thread = threading.Thread(target=attach_rank_1)
    thread.start()
    while not is_left(name):
        time.sleep(0.001)
    time.sleep(0.2)
    with pytest.raises(ValueError, match="rank is 1, and taken"):
        SharedMemoryGroup(**first | {"rank": 1})
    thread.join()
    assert len(threads_errors) == 2
    assert all(isinstance(error, TimeoutError) and "rank 2 did" in str(error) for error in threads_errors)
    assert not is_left(name)


def test_a_segment_without_room_is_refused() -> None:
    found = os.statvfs("/dev/shm")
    if found.f_frsize * found.f_blocks >= 2 * MAX_RANKS * MAX_CAPACITY:
        pytest.skip("/dev/shm is larger than any segment")
    name = new_name()
    with pytest.raises(OSError, match=f"the segment needs {2 * MAX_RANKS * MAX_CAPACITY} bytes of /dev/shm"):
        SharedMemoryGroup(rank=0, world_size=MAX_RANKS, name=name, timeout_s=1.0, capacity_bytes=MAX_CAPACITY)
    assert not is_left(name)


def test_wrong_tensors_are_named() -> None:
    def work(group: SharedMemoryGroup) -> None:
        with pytest.raises(TypeError, match=r"tensor has dtype torch\.float64, must be one of torch\.float32"):
            group.all_reduce(torch.ones(3, dtype=torch.float64))
        with pytest.raises(ValueError, match="tensor is on meta, must be on the CPU"):
            group.all_reduce(torch.ones(3, device="meta"))
        with pytest.raises(ValueError, match="tensor is on meta, must be on the CPU"):
            group.all_gather(torch.ones(3, device="meta"))
        with pytest.raises(ValueError, match="partial has shape"):
            group.reduce_add_norm(torch.ones(3, 4), None, torch.ones(5), eps=EPS)
        with pytest.raises(ValueError, match="weight is on meta, must be on the CPU"):
            group.reduce_add_norm(torch.ones(3, 4), None, torch.ones(4, device="meta"), eps=EPS)
        with pytest.raises(TypeError, match=r"partial has dtype torch\.float64, must be one of torch\.float32"):
            group.reduce_add_norm(torch.ones(3, 4).double(), None, torch.ones(4).double(), eps=EPS)
        group.all_reduce(torch.ones(3))  # none of these was a call

    succeed(on_ranks(2, work))


class Ranks:
    """Processes that are forked from one that has imported torch, so that many of them start quickly."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["dist_vlm.kernels.shared_memory"])
        self._started: list[Any] = []

    def start(self, target: Callable[..., None], *args: Any) -> tuple[Any, Any]:
        answers, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=target, args=(*args, sender), daemon=True)
        process.start()
        sender.close()
        self._started.append(process)
        return process, answers

    def start_group(self, world_size: int, timeout_s: float, *job: Any) -> tuple[str, list[Any], list[Any]]:
        name = new_name()
        started = [
            self.start(shared_memory_ranks.run_rank, rank, world_size, name, timeout_s, job)
            for rank in range(world_size)
        ]
        for process, answers in started:
            assert answers.poll(60.0)
            assert answers.recv() == ("attached", process.pid)
        assert not is_left(name)
        return name, [process for process, _ in started], [answers for _, answers in started]

    def end(self) -> None:
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.join(20.0)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))  # where the processes find `tests`
        started = Ranks()
        yield started
        started.end()


def answer(answers: Any, seconds: float = 60.0) -> Any:
    assert answers.poll(seconds)
    return answers.recv()


@pytest.mark.timeout(200)
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_call_back_to_back(ranks, world_size) -> None:
    _, processes, answers = ranks.start_group(world_size, 60.0, "rounds", 3000)
    assert [answer(pipe) for pipe in answers] == [0] * world_size
    for process in processes:
        process.join(20.0)
        assert process.exitcode == 0


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("what", "rows"), [("all_reduce", 1), ("all_reduce", 600), ("reduce_add_norm", 600), ("all_gather", 40)]
)
def test_a_killed_rank_is_named_at_once(ranks, what, rows) -> None:
    name, processes, answers = ranks.start_group(3, 60.0, "loop", what, rows)
    time.sleep(0.2)
    os.kill(processes[1].pid, signal.SIGKILL)
    for rank in (0, 2):
        error, message, taken, refused = answer(answers[rank])
        assert error == "PeerLost" and message == refused
        assert message.startswith(f"{what}: rank 1 ended without arriving, noticed after 0.")
        assert taken < 5.0
        processes[rank].join(20.0)
    assert not is_left(name)


@pytest.mark.timeout(200)
def test_a_killed_rank_that_nobody_waited_for_is_named(ranks) -> None:
    process, answers = ranks.start(shared_memory_ranks.run_with_a_zombie, new_name(), 60.0)
    error, message, taken, _ = answer(answers)
    assert error == "PeerLost" and message.startswith("all_reduce: rank 1 ended without arriving")
    assert taken < 5.0
    process.join(20.0)
    assert process.exitcode == 0


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("what", "rows"), [("all_reduce", 1), ("reduce_add_norm", 600)])
def test_a_stopped_rank_is_named_by_the_deadline(ranks, what, rows) -> None:
    name, processes, answers = ranks.start_group(3, 1.5, "loop", what, rows)
    time.sleep(0.2)
    os.kill(processes[2].pid, signal.SIGSTOP)
    for rank in (0, 1):
        error, message, taken, refused = answer(answers[rank])
        assert error == "PeerLost" and message == refused
        assert message.startswith(f"{what}: rank 2 did not arrive in 1.5 s")
        assert 1.2 < taken < 6.0
    assert not is_left(name)
    os.kill(processes[2].pid, signal.SIGCONT)
    error, message, _, _ = answer(answers[2])
    assert error == "PeerLost" and message.startswith(f"{what}: rank 2 (this rank) did not arrive in 1.5 s")
    for process in processes:
        process.join(20.0)
        assert process.exitcode == 0
