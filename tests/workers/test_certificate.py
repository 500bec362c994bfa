"""What the certificate finds in collectives of ranks that are threads, and what all ranks make of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_vlm.workers.certificate import Certificate
from dist_vlm.workers.collectives import CollectiveError
from dist_vlm.workers.comm import Communicator
from dist_vlm.workers.open_collectives import all_reasons, settle
from tests.workers.collective_ranks import config_of
from tests.workers.thread_comm import ThreadComm, on_ranks

HIDDEN, COLUMNS, MAX_ROWS = 48, 20, 40
# In rows. The certificate must try both sides of each, the smallest sizes and the largest.
EDGES = {"reduce_add_norm": [10, 20], "all_reduce": [7], "all_gather": [5]}
TRIED = {
    "reduce_add_norm": [1, 3, 10, 11, 20, 21, 40],
    "all_reduce": [1, 3, 7, 8, 40],
    "all_gather": [1, 3, 5, 6, 40],
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRIES = [(op, rows) for op, counts in TRIED.items() for rows in counts]


class HostComm(ThreadComm):
    """Whose process group gathers over the threads' board."""

    __slots__ = ()
    all_reduce = Communicator.all_reduce
    all_gather = Communicator.all_gather

    def gather_on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(tensor))


class Exact:
    """Right collectives; faults override a part of them.

    weight: of each rank's part in the sum, as this rank takes it. tried: the rows of all calls, by op.
    """

    name, is_recordable = "exact", True

    def __init__(self, comm: HostComm, dtype: torch.dtype) -> None:
        self.comm, self.dtype = comm, dtype
        self.tried: dict[str, list[int]] = {op: [] for op in EDGES}
        self.closed = False

    def edges(self, op: str) -> list[int]:
        width = COLUMNS if op == "all_gather" else HIDDEN
        return [rows * width * self.dtype.itemsize for rows in EDGES[op]]

    def parts(self, op: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.tried[op].append(tensor.shape[0])
        return self.comm._exchange(tensor)

    def total(self, op: str, parts: list[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros(parts[0].shape)
        for part in parts:
            total = total + part.float()
        return total.to(self.dtype)

    def norm(self, summed: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = summed.double()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double()).to(self.dtype)

    def all_reduce(self, tensor: torch.Tensor) -> bool:
        tensor.copy_(self.total("all_reduce", self.parts("all_reduce", tensor)))
        return True

    def reduce_add_norm(
        self, partial: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, *, eps: float, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        summed = self.total("reduce_add_norm", self.parts("reduce_add_norm", partial))
        if residual is not None:
            summed = (summed.float() + residual.float()).to(self.dtype)
        return self.norm(summed, weight, eps), summed

    def all_gather(self, part: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.parts("all_gather", part))

    def gather_columns(self, part: torch.Tensor, out: torch.Tensor) -> bool:
        out.copy_(torch.cat(self.parts("all_gather", part), dim=1)[:, : out.shape[1]])
        return True

    def check(self) -> None: ...

    def close(self) -> None:
        self.closed = True


class WrongSum(Exact):
    """In `op`, at `rows` rows alone if they are not None, `spoil(parts, total, rank)` instead of the total."""

    def __init__(self, comm: HostComm, dtype: torch.dtype, op: str, rows: int | None, spoil: Callable) -> None:
        super().__init__(comm, dtype)
        self.op, self.rows, self.spoil = op, rows, spoil

    def total(self, op: str, parts: list[torch.Tensor]) -> torch.Tensor:
        total = super().total(op, parts)
        if op == self.op and self.rows in (None, parts[0].shape[0]):
            return self.spoil(parts, total, self.comm.rank)
        return total


class WrongGather(Exact):
    def __init__(self, comm: HostComm, dtype: torch.dtype, rows: int | None, method: str) -> None:
        super().__init__(comm, dtype)
        self.rows, self.method = rows, method

    def _swapped(self, method: str, part: torch.Tensor) -> list[torch.Tensor]:
        parts = self.parts("all_gather", part)
        wrong = method == self.method and self.rows in (None, part.shape[0])
        return [parts[1], parts[0], *parts[2:]] if wrong else parts

    def all_gather(self, part: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._swapped("all_gather", part))

    def gather_columns(self, part: torch.Tensor, out: torch.Tensor) -> bool:
        out.copy_(torch.cat(self._swapped("gather_columns", part), dim=1)[:, : out.shape[1]])
        return True


class WrongNorm(Exact):
    def __init__(self, comm: HostComm, dtype: torch.dtype, spoil: Callable) -> None:
        super().__init__(comm, dtype)
        self.spoil = spoil

    def norm(self, summed: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self.spoil(summed, super().norm(summed, weight, eps))


class Raises(Exact):
    """On `rank` `method` raises, once the ranks have exchanged what they must."""

    def __init__(self, comm: HostComm, dtype: torch.dtype, method: str, rank: int | None) -> None:
        super().__init__(comm, dtype)
        self.method, self.rank = method, rank

    def _raise(self, method: str) -> None:
        if method == self.method and self.rank in (None, self.comm.rank):
            raise CollectiveError("rank 7 took no part")

    def all_reduce(self, tensor: torch.Tensor) -> bool:
        super().all_reduce(tensor)
        self._raise("all_reduce")
        return True

    def reduce_add_norm(self, *inputs: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        answer = super().reduce_add_norm(*inputs, **named)
        self._raise("reduce_add_norm")
        return answer

    def gather_columns(self, part: torch.Tensor, out: torch.Tensor) -> bool:
        super().gather_columns(part, out)
        self._raise("gather_columns")
        return True

    def check(self) -> None:
        self._raise("check")


def host_comms(ranks: int) -> list[HostComm]:
    barrier, board = threading.Barrier(ranks, timeout=20), [torch.empty(0)] * ranks
    return [HostComm(rank, ranks, barrier, board) for rank in range(ranks)]


def faults(ranks: int, dtype: torch.dtype, make: Callable[..., Exact], *inputs: Any) -> list[str | None]:
    """What the certificate says on each rank."""
    return [fault for fault, _ in certified(ranks, dtype, make, *inputs)]


def certified(
    ranks: int, dtype: torch.dtype, make: Callable[..., Exact], *inputs: Any
) -> list[tuple[str | None, Exact]]:
    comms = host_comms(ranks)

    def work(rank: int) -> tuple[str | None, Exact]:
        comm = comms[rank]
        comm.collectives = collectives = make(comm, dtype, *inputs)
        certificate = Certificate(
            comm,
            hidden_size=HIDDEN,
            max_rows=MAX_ROWS,
            max_gathered=MAX_ROWS,
            columns=COLUMNS,
            dtype=dtype,
            device=torch.device("cpu"),
        )
        return certificate.fault(), collectives

    return on_ranks(comms, work)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_right_collectives_pass_at_every_edge(ranks, dtype) -> None:
    for fault, collectives in certified(ranks, dtype, Exact):
        assert fault is None
        assert {op: sorted(set(rows)) for op, rows in collectives.tried.items()} == TRIED


def twice(parts, total, rank):
    return total + parts[1]


def dropped(parts, total, rank):
    return (total.float() - parts[-1].float()).to(total.dtype)


def one_element(parts, total, rank):
    changed = total.clone()
    changed.view(-1)[-1] += 1
    return changed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spoil", [twice, dropped])
@pytest.mark.parametrize("op", ["reduce_add_norm", "all_reduce"])
def test_a_part_that_counts_twice_or_not_at_all_is_found(op, spoil, dtype) -> None:
    for fault in faults(3, dtype, WrongSum, op, None, spoil):
        assert fault is not None
        assert fault.startswith(f"{op} of 1 rows: ")
        assert f"of {HIDDEN} numbers" in fault
        assert fault.endswith("wrong")


@pytest.mark.parametrize(("op", "rows"), [case for case in TRIES if case[0] != "all_gather"])
def test_a_single_wrong_number_at_any_edge_is_found(op, rows) -> None:
    for fault in faults(2, torch.bfloat16, WrongSum, op, rows, one_element):
        assert fault is not None
        assert fault.startswith(f"{op} of {rows} rows: ")
        assert fault.endswith(f" of {rows * HIDDEN} numbers are wrong") or "numbers of the norm are wrong" in fault


def test_a_wrong_number_on_one_rank_is_found_there() -> None:
    def spoil(parts, total, rank):
        return one_element(parts, total, rank) if rank == 1 else total

    first, second = faults(2, torch.float32, WrongSum, "all_reduce", None, spoil)
    assert second == f"all_reduce of 1 rows: 1 of {HIDDEN} numbers are wrong"
    assert first == "all_reduce of 1 rows: ranks 1 have other bits than rank 0"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["reduce_add_norm", "all_reduce"])
def test_another_order_of_summation_on_one_rank_is_found(op, dtype) -> None:
    """Whole numbers do not show it."""

    def backwards(parts, total, rank):
        if rank != 2:
            return total
        total = parts[-1]
        for part in reversed(parts[:-1]):
            total = total + part  # rounded each time
        return total

    whole = [torch.randint(-4, 5, (64,), generator=torch.Generator().manual_seed(s)).to(dtype) for s in range(4)]
    assert torch.equal(backwards(whole, None, 2), sum(whole[1:], whole[0]))
    for fault in faults(4, dtype, WrongSum, op, None, backwards):
        assert fault == f"{op} of 1 rows: ranks 2 have other bits than rank 0"


def test_numbers_at_one_another_s_places_on_one_rank_are_found() -> None:
    """Only where they are not whole, so that no sum of the bits shows it."""

    def swapped(parts, total, rank):
        if rank != 1 or torch.equal(total, total.round()):
            return total
        changed = total.clone()
        changed[0, 3], changed[0, 4] = total[0, 4], total[0, 3]
        return changed

    for fault in faults(2, torch.float32, WrongSum, "all_reduce", None, swapped):
        assert fault == "all_reduce of 1 rows: ranks 1 have other bits than rank 0"


@pytest.mark.parametrize("method", ["all_gather", "gather_columns"])
@pytest.mark.parametrize("rows", TRIED["all_gather"])
def test_parts_gathered_in_another_order_are_found(method, rows) -> None:
    for fault in faults(2, torch.float16, WrongGather, rows, method):
        assert fault is not None
        assert fault.startswith(f"all_gather of {rows} rows: ")
        assert fault.endswith(f"of {2 * rows * COLUMNS} numbers are wrong")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_norm_is_found(dtype) -> None:
    def scaled(summed, normed):
        return normed * 1.05

    def of_the_first_row(summed, normed):
        changed = normed.clone()
        if len(normed) == 11:
            changed[10] = normed[0]
        return changed

    for fault in faults(2, dtype, WrongNorm, scaled):
        assert fault is not None
        assert fault.startswith("reduce_add_norm of 1 rows: ")
        assert fault.endswith(f" of {HIDDEN} numbers of the norm are wrong")
    for fault in faults(2, dtype, WrongNorm, of_the_first_row):
        assert fault is not None
        assert fault.startswith("reduce_add_norm of 11 rows: ")
        assert fault.endswith(f" of {11 * HIDDEN} numbers of the norm are wrong")


class WrongResidual(Exact):
    """The norm is that of the right sum, but the sum has no residual."""

    def reduce_add_norm(self, partial, residual, weight, **named):
        normed, summed = super().reduce_add_norm(partial, residual, weight, **named)
        return normed, summed - residual


def test_a_sum_without_the_residual_is_found_beside_a_right_norm() -> None:
    for fault in faults(2, torch.float32, WrongResidual):
        assert fault is not None
        assert fault.startswith("reduce_add_norm of 1 rows: ")
        assert fault.endswith(f" of {HIDDEN} numbers are wrong")


@pytest.mark.parametrize(
    ("method", "op"),
    [
        ("reduce_add_norm", "reduce_add_norm"),
        ("all_reduce", "all_reduce"),
        ("gather_columns", "all_gather"),
        ("check", "reduce_add_norm"),
    ],
)
def test_an_exception_is_a_reason(method, op) -> None:
    for fault in faults(2, torch.float32, Raises, method, None):
        assert fault == f"{op} of 1 rows: CollectiveError: rank 7 took no part"


def test_an_exception_on_one_rank_leaves_the_ranks_in_step() -> None:
    """As a rank that has missed another once and says so at every check from then on."""
    comms = host_comms(2)

    def work(rank: int) -> tuple[str | None, dict[int, str]]:
        comm = comms[rank]
        comm.collectives = Raises(comm, torch.float32, "check", 1)
        certificate = Certificate(
            comm, hidden_size=HIDDEN, max_rows=MAX_ROWS, max_gathered=MAX_ROWS, columns=COLUMNS, dtype=torch.float32,
            device=torch.device("cpu"),
        )  # fmt: skip
        return certificate.fault(), all_reasons(comm, "a reason" if rank else None)

    for rank, (fault, reasons) in enumerate(on_ranks(comms, work)):
        assert reasons == {1: "a reason"}
        if rank == 1:
            assert fault == "reduce_add_norm of 1 rows: CollectiveError: rank 7 took no part"


def config(rank: int, collectives: str) -> Any:
    job = {"device": "cpu", "dtype": "float32", "rank": rank, "world_size": 3, "share_gpu": False}
    return config_of(job | {"collectives": collectives})


def settled(mode: str, reasons: list[str | None]) -> tuple[list[HostComm], list[Exact | None], list[Exception | None]]:
    """Each rank's handle, what it had opened, and what it raised. A rank with a reason has opened nothing."""
    comms = host_comms(len(reasons))

    def work(rank: int) -> tuple[Exact | None, Exception | None]:
        opened = Exact(comms[rank], torch.float32) if reasons[rank] is None else None
        try:
            settle(config(rank, mode), comms[rank], opened, reasons[rank])
        except CollectiveError as error:
            return opened, error
        return opened, None

    opened, errors = zip(*on_ranks(comms, work), strict=True)
    return comms, list(opened), list(errors)


def test_without_a_reason_all_ranks_use_what_they_opened() -> None:
    comms, opened, errors = settled("fused", [None] * 3)
    assert errors == [None] * 3
    for comm, collectives in zip(comms, opened, strict=True):
        assert comm.collectives is collectives is not None
        assert not collectives.closed


def test_one_rank_s_reason_takes_all_ranks_back_to_the_group(monkeypatch, caplog) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    comms, opened, errors = settled("fused", [None, "no such device", "out of memory"])
    assert errors == [None] * 3
    assert [comm.collectives for comm in comms] == [None] * 3
    assert opened[0] is not None
    assert opened[0].closed
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line == "the collectives are those of gloo: rank 1: no such device; rank 2: out of memory"


def test_strict_raises_on_all_ranks() -> None:
    comms, opened, errors = settled("strict", [None, None, "no such device"])
    for error in errors:
        assert str(error) == ("parallel.collectives is 'strict', and they cannot be used: rank 2: no such device")
    assert [comm.collectives for comm in comms] == [None] * 3
    assert all(collectives.closed for collectives in opened[:2])


def test_strict_without_a_reason_starts() -> None:
    comms, opened, errors = settled("strict", [None] * 3)
    assert errors == [None] * 3
    assert [comm.collectives for comm in comms] == opened


def test_reasons_are_cut_off_and_the_same_on_all_ranks() -> None:
    texts = ["é" * 400, None, "x" + "ä" * 400]
    comms = host_comms(3)
    found = on_ranks(comms, lambda rank: all_reasons(comms[rank], texts[rank]))
    assert found[0] == found[1] == found[2]
    assert list(found[0]) == [0, 2]
    assert found[0][0] == "é" * 250
    assert found[0][2].startswith("x" + "ä" * 249)
    assert len(found[0][2]) == 251  # half of the last letter
