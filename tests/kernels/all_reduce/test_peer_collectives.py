"""The kernels on virtual ranks, against sums in rank order."""

from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels.all_reduce.reference import all_gather_reference, all_reduce_reference
from dist_vlm.kernels.reduce_add_norm import reduce_add_norm_reference
from tests.kernels.all_reduce.virtual_ranks import run

ON_GPU = torch.cuda.is_available()
# Interpreted, float32 is cut off to bfloat16, not rounded.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if ON_GPU else (torch.float32, torch.float16)
WORLDS = (2, 3, 4, 8) if ON_GPU else (2, 3)
SHAPES = [(1, 1), (1, 8), (2, 4096), (3, 17), (5, 769), (9, 64), (2, 5125)]
if ON_GPU:
    SHAPES += [(64, 4096), (129, 4096), (33, 8192), (704, 1024), (8192, 64)]
EPS = 1e-5


def part_of(rank: int, shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + 10 * sum(shape) + rank)
    return torch.randn(*shape, generator=generator).to(dtype)


def parts_of(world_size: int, shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 0) -> list[torch.Tensor]:
    return [part_of(rank, shape, dtype, seed=seed) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("shots", [1, 2])
def test_the_sum_has_the_bits_of_one_taken_in_rank_order(world_size, shots) -> None:
    cases = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]

    def job(rank):
        sums = []
        for shape, dtype in cases:
            rank.nap(300)
            part = rank.put(part_of(rank.number, shape, dtype))
            assert rank.collectives.all_reduce(part, shots=shots) is part
            sums.append(part)
        return [*sums, rank.collectives.buffers.missing_ranks]

    for answers in run(world_size, job, capacity=1 << 22):
        assert answers.pop() is None
        for (shape, dtype), total in zip(cases, answers, strict=True):
            assert torch.equal(total, all_reduce_reference(parts_of(world_size, shape, dtype))), (shape, dtype)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("shots", [1, 2])
@pytest.mark.parametrize("with_residual", [True, False])
def test_fused_with_residual_and_norm(world_size, shots, with_residual) -> None:
    # A dtype for each shape, another one in each test: every width and dtype is a kernel to compile.
    turn = world_size + shots + with_residual
    cases = [(shape, DTYPES[(index + turn) % len(DTYPES)]) for index, shape in enumerate(SHAPES)]

    def inputs(shape, dtype):
        residual = part_of(77, shape, dtype) if with_residual else None
        return residual, torch.linspace(0.5, 2, shape[1]).to(dtype)

    def job(rank):
        found = []
        for shape, dtype in cases:
            residual, weight = (None if x is None else rank.put(x) for x in inputs(shape, dtype))
            part = rank.put(part_of(rank.number, shape, dtype))
            rank.nap(300)
            found += rank.collectives.reduce_add_norm(part, residual, weight, eps=EPS, shots=shots)
        return found

    answers = run(world_size, job, capacity=1 << 22)
    for index, (shape, dtype) in enumerate(cases):
        residual, weight = inputs(shape, dtype)
        total = all_reduce_reference(parts_of(world_size, shape, dtype))
        normed, summed = reduce_add_norm_reference(total, residual, weight, eps=EPS, all_reduce=lambda x: x)
        for answer in answers:
            assert torch.equal(answer[2 * index + 1], summed), (shape, dtype)
            tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
            torch.testing.assert_close(answer[2 * index], normed, atol=tolerance, rtol=tolerance)
            assert torch.equal(answer[2 * index], answers[0][2 * index]), "the same bits on all ranks"


@pytest.mark.parametrize("world_size", WORLDS)
def test_gathered_parts_and_columns(world_size) -> None:
    shapes = [(1, 1), (3, 17), (5, 1031), (2, 3000)]

    def job(rank):
        found = []
        for shape in shapes:
            part = rank.put(part_of(rank.number, shape, torch.float16))
            found.append(rank.collectives.all_gather(part))
            wide = torch.full((shape[0], world_size * shape[1] + 2), -7.0, device=rank.device)
            width = world_size * shape[1] - shape[1] // 3
            rank.collectives.all_gather(part, out=wide[:, :width])
            found.append(wide)
        found.append(rank.collectives.all_gather(rank.put(part_of(rank.number, (40, 3), torch.float32)).T))
        return found

    for answers in run(world_size, job):
        for index, shape in enumerate(shapes):
            parts = parts_of(world_size, shape, torch.float16)
            assert torch.equal(answers[2 * index], all_gather_reference(parts))
            width = world_size * shape[1] - shape[1] // 3
            columns = torch.cat(parts, dim=1).float()
            assert torch.equal(answers[2 * index + 1][:, :width], columns[:, :width])
            assert (answers[2 * index + 1][:, width:] == -7).all(), "beyond the width nothing is written"
        assert torch.equal(answers[-1], torch.stack([part.T for part in parts_of(world_size, (40, 3), torch.float32)]))


def test_what_does_not_fit_the_buffers_goes_in_pieces() -> None:
    shape = (50, 700)

    def job(rank):
        part = rank.put(part_of(rank.number, shape, torch.float32))
        weight = torch.ones(700, device=rank.device)
        one = rank.collectives.all_reduce(part.clone(), shots=1)
        two = rank.collectives.all_reduce(part.clone(), shots=2)
        _, fused = rank.collectives.reduce_add_norm(part.clone(), None, weight, eps=EPS, shots=2)
        columns = torch.empty((50, 1400), device=rank.device)
        return [one, two, fused, rank.collectives.all_gather(part), rank.collectives.all_gather(part, out=columns)]

    parts = parts_of(2, shape, torch.float32)
    total = all_reduce_reference(parts)
    for one, two, fused, gathered, columns in run(2, job, capacity=1 << 15):
        assert all(torch.equal(found, total) for found in (one, two, fused))
        assert torch.equal(gathered, torch.stack(parts))
        assert torch.equal(columns, torch.cat(parts, dim=1))


def test_numbers_that_look_like_an_empty_place() -> None:
    """Negative zero, and in float32 two of them side by side, are sent as zero."""
    strange = torch.tensor([-0x7FFF8000] * 5 + [-0x80000000], dtype=torch.int32).view(torch.float32)

    def job(rank):
        floats, halves = rank.put(strange), torch.full((40,), -0.0, dtype=torch.float16, device=rank.device)
        return [rank.collectives.all_reduce(x.clone(), shots=s) for x in (floats, halves) for s in (1, 2)]

    for answers in run(2, job):
        assert all((answer == 0).all() for answer in answers)


def test_infinities_and_nan_arrive() -> None:
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0])

    def job(rank):
        part = rank.put(values) if rank.number == 0 else torch.ones(4, device=rank.device)
        return rank.collectives.all_reduce(part, shots=1)

    for answer in run(2, job):
        torch.testing.assert_close(
            answer, torch.tensor([float("inf"), float("-inf"), float("nan"), 2.0]), equal_nan=True
        )


@pytest.mark.parametrize("world_size", WORLDS)
def test_many_calls_of_all_sizes_while_ranks_are_late(world_size) -> None:
    """A buffer is used again every third call: a rank that is ahead must not run into one that is behind."""
    rounds = 16_000 // world_size if ON_GPU else 120
    generator = torch.Generator().manual_seed(world_size)
    draws = torch.randint(0, 1 << 30, (rounds, 3), generator=generator).tolist()
    widths = (1, 3, 64, 769, 2048)

    def job(rank):
        wrong = torch.zeros((), dtype=torch.int64, device=rank.device)
        for number, (kind, size, late) in enumerate(draws):
            width, rows = widths[size % 5], 1 + size // 5 % (40 if ON_GPU else 4)
            dtype = (torch.float32, torch.float16)[kind % 2]
            place = torch.arange(rows * width, device=rank.device).view(rows, width)
            parts = [((place * 7 + s * 5 + number) % 9 - 4).to(dtype) for s in range(world_size)]
            if late % world_size == rank.number:
                rank.nap(400 if ON_GPU else 3000)
            total, mine = sum(parts), parts[rank.number]
            match kind // 2 % 4:
                case 0:
                    got = rank.collectives.all_reduce(mine, shots=1)
                case 1:
                    got = rank.collectives.all_reduce(mine, shots=2)
                case 2:
                    weight = torch.ones(width, dtype=dtype, device=rank.device)
                    _, got = rank.collectives.reduce_add_norm(mine, None, weight, eps=EPS, shots=1 + late % 2)
                case _:
                    got, total = rank.collectives.all_gather(mine), torch.stack(parts)
            wrong += (got != total).sum()
        return [wrong, rank.collectives.buffers.missing_ranks]

    for wrong, missing in run(world_size, job):
        assert missing is None
        assert wrong == 0


def test_a_rank_that_never_comes_is_named_and_nobody_waits_again() -> None:
    def job(rank):
        first = torch.ones(64, device=rank.device)
        rank.collectives.all_reduce(first, shots=1)
        if rank.number == 1:
            return [first, lambda: None]
        for _ in range(300):  # at a thousand looks each, none but the first looks more than once
            rank.collectives.all_reduce(torch.ones(64, device=rank.device), shots=1)
        return [first, rank.collectives.buffers.missing_ranks]

    answers = run(3, job, looks=2000)
    assert all((first == 3).all() for first, _ in answers)
    assert answers[0][1] == answers[2][1] == [1]
    assert answers[1][1] is None


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_recordings_that_are_replayed_out_of_step(world_size) -> None:
    """Each rank replays its own recording of a step of calls, as fast as it can, late by chance."""
    replays, shape = 20_000, (3, 769)  # of five calls each

    def job(rank):
        device, kept = rank.device, rank.kept
        stream = torch.cuda.current_stream()
        kept["number"] = torch.zeros((), dtype=torch.int64, device=device)
        kept["wrong"] = torch.zeros((), dtype=torch.int64, device=device)
        place = torch.arange(shape[0] * shape[1], device=device).view(shape)
        weight = torch.ones(shape[1], dtype=torch.bfloat16, device=device)

        def step():
            parts = [((place * 7 + s * 5 + kept["number"]) % 9 - 4).to(torch.bfloat16) for s in range(world_size)]
            total = sum(parts)
            mine = parts[rank.number]
            for shots in (1, 2):
                kept["wrong"] += (rank.collectives.all_reduce(mine.clone(), shots=shots) != total).sum()
                _, got = rank.collectives.reduce_add_norm(mine.clone(), None, weight, eps=EPS, shots=shots)
                kept["wrong"] += (got != total).sum()
            kept["wrong"] += (rank.collectives.all_gather(mine) != torch.stack(parts)).sum()
            kept["number"] += 1

        step()
        kept["step"], kept["stream"] = step, stream
        return rank

    ranks = run(world_size, job)
    # One after another: a recording runs nothing.
    for rank in ranks:
        rank.kept["graph"] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(rank.kept["graph"], stream=rank.kept["stream"]):
            rank.kept["step"]()
    for number in range(replays):
        for rank in ranks if number % 2 else reversed(ranks):
            with torch.cuda.stream(rank.kept["stream"]):
                rank.nap(300)
                rank.kept["graph"].replay()
    torch.cuda.synchronize()
    for rank in ranks:
        assert rank.collectives.buffers.missing_ranks() is None
        assert int(rank.kept["number"]) == replays + 1
        assert int(rank.kept["wrong"]) == 0


def test_wrong_arguments_are_named() -> None:
    def job(rank):
        def message(call):
            with pytest.raises((TypeError, ValueError)) as error:
                call()
            return str(error.value)

        group, device = rank.collectives, rank.device
        return [
            message(lambda: group.all_reduce(torch.ones(4, dtype=torch.int64, device=device), shots=1)),
            message(lambda: group.all_reduce(torch.ones(4, 4, device=device).T, shots=1)),
            message(
                lambda: group.all_gather(torch.ones(2, 3, device=device), out=torch.ones(2, 7, device=device)),
            ),
            message(
                lambda: group.reduce_add_norm(
                    torch.ones(1, 1 << 20, device=device), None, torch.ones(1 << 20, device=device), eps=EPS, shots=1
                )
            ),
        ]

    for dtype, strides, out, size in run(2, job):
        assert "all_reduce: tensor has dtype torch.int64, must be one of" in dtype
        assert "all_reduce: tensor has strides (1, 4), must be contiguous" in strides
        assert "all_gather: out has shape [2, 7]" in out
        assert "rows of 4194304 bytes do not fit buffers of 1048576 for 2 ranks" in size
