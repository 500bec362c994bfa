"""What the collectives of a launch must show before they are used.

Every way is run at both ends of each range of sizes it is chosen for, at once and in a recording. On small whole
numbers, whose sum is exact in every dtype, each rank must get that sum; on random ones all ranks the same bits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Self

import torch
from torch import Tensor

from dist_vlm.kernels.reduce_add_norm import reduce_add_norm_reference
from dist_vlm.workers.comm import Communicator
from dist_vlm.workers.config import RankConfig
from dist_vlm.workers.failure import describe
from dist_vlm.workers.graph import Recording
from dist_vlm.workers.models.spec import ModelSpec
from dist_vlm.workers.open_collectives import all_reasons

_EPS = 1e-5
# Tensors that a collective returns, at most.
_MOST_RESULTS = 2
# Of a slice or a picture: what ranks tell one another of it goes as float32.
_NUM_VOTES = 4
# Of the norm: two roundings to the dtype.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}

_log = logging.getLogger(__name__)


class Certificate:
    """comm: with the collectives under test. hidden_size: numbers of a row; max_rows: of the launch's largest step;
    columns: of a rank's part of the logits, and max_gathered: rows of so many that are gathered at once, at most."""

    def __init__(
        self,
        comm: Communicator,
        *,
        hidden_size: int,
        max_rows: int,
        max_gathered: int,
        columns: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._comm = comm
        self._hidden_size = hidden_size
        self._max_rows = max_rows
        self._max_gathered = max_gathered
        self._columns = columns
        self._dtype = dtype
        self._device = device

    @classmethod
    def of_launch(
        cls, config: RankConfig, spec: ModelSpec, comm: Communicator, *, dtype: torch.dtype, device: torch.device
    ) -> Self:
        """For all that the steps of a launch ask of the collectives."""
        columns, ranks = -(-spec.vocab_size // comm.world_size), comm.world_size
        # A rank's share of a step's features, in rows of as many numbers as its part of the logits has.
        shared = -(-config.max_num_batched_tokens // ranks) * spec.hidden_size // columns
        return cls(
            comm,
            hidden_size=spec.hidden_size,
            max_rows=config.max_num_batched_tokens,
            max_gathered=max(config.max_num_seqs, shared),
            columns=columns,
            dtype=dtype,
            device=device,
        )

    @torch.inference_mode()
    def fault(self) -> str | None:
        """Why this rank does not trust the collectives, None where none has anything against them. Every rank calls it;
        all stop at the first check that one of them fails."""
        began = time.perf_counter()
        for name, rows, check in self._checks():
            reasons = all_reasons(self._comm, _tried(check))
            if reasons:
                rank, reason = next(iter(reasons.items()))
                own = reasons.get(self._comm.rank, f"rank {rank} found: {reason}")
                return f"{name} of {rows} rows: {own}"
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # a recording's memory is of no use to anything else
        _log.info("the collectives have passed in %.2f s", time.perf_counter() - began)
        return None

    def _checks(self) -> Iterator[tuple[str, int, Callable[[], str | None]]]:
        for rows in self._row_counts("reduce_add_norm", self._hidden_size, self._max_rows):
            yield "reduce_add_norm", rows, partial(self._reduce_add_norm, rows)
        for rows in self._row_counts("all_reduce", self._hidden_size, self._max_rows):
            yield "all_reduce", rows, partial(self._all_reduce, rows)
        for rows in self._row_counts("all_gather", self._columns, self._max_gathered):
            yield "all_gather", rows, partial(self._all_gather, rows)
        if self._dtype != torch.float32:
            votes = type(self)(
                self._comm,
                hidden_size=_NUM_VOTES,
                max_rows=self._max_rows,
                max_gathered=1,
                columns=1,
                dtype=torch.float32,
                device=self._device,
            )
            yield "all_reduce in float32", 3, partial(votes._all_reduce, 3)

    def _row_counts(self, op: str, width: int, most: int) -> list[int]:
        """Rows at which the way changes, and the next more; the fewest and the most."""
        assert self._comm.collectives is not None
        row_bytes = width * self._dtype.itemsize
        ends = [size // row_bytes for size in self._comm.collectives.edges(op)]
        wanted = {1, 3, most, *ends, *(end + 1 for end in ends)}
        return sorted(rows for rows in wanted if 1 <= rows <= most)

    def _reduce_add_norm(self, rows: int) -> str | None:
        weight = torch.linspace(0.5, 2.0, self._hidden_size, device=self._device).to(self._dtype)

        def work(part: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            return self._comm.reduce_add_norm(
                part.clone(), residual.clone(), weight, eps=_EPS, op=reduce_add_norm_reference
            )

        def expected(parts: list[Tensor], residual: Tensor) -> tuple[Tensor, Tensor]:
            total = sum(parts[1:], parts[0])
            return reduce_add_norm_reference(total, residual, weight, eps=_EPS, all_reduce=lambda tensor: tensor)

        return self._run(rows, self._hidden_size, work, expected)

    def _all_reduce(self, rows: int) -> str | None:
        def work(part: Tensor, _: Tensor) -> tuple[Tensor]:
            return (self._comm.all_reduce(part.clone()),)

        return self._run(rows, self._hidden_size, work, lambda parts, _: (sum(parts[1:], parts[0]),))

    def _all_gather(self, rows: int) -> str | None:
        width = self._columns * self._comm.world_size

        def work(part: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            out = torch.empty((rows, width), dtype=torch.float32, device=self._device)
            return self._comm.all_gather(part), self._comm.gather_columns(part, out)

        def expected(parts: list[Tensor], _: Tensor) -> tuple[Tensor, Tensor]:
            return torch.stack(parts), torch.cat(parts, dim=1).float()

        return self._run(rows, self._columns, work, expected)

    def _run(
        self,
        rows: int,
        width: int,
        work: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        expected: Callable[[list[Tensor], Tensor], tuple[Tensor, ...]],
    ) -> str | None:
        """The first fault of: whole numbers, the same in a recording with other numbers, and random numbers.

        What can fail on one rank alone comes first, and the ranks go on together or not at all.
        """
        shifts = (0, 17, 40) if self._device.type == "cuda" else (0,)
        prepared: list[tuple[Tensor, tuple[Tensor, ...]]] = []
        residual = random = part = torch.empty(0)

        def prepare() -> None:
            nonlocal part, residual, random
            residual = self._whole_numbers(rows, width, 99)
            for shift in shifts:
                parts = [self._whole_numbers(rows, width, rank + shift) for rank in range(self._comm.world_size)]
                prepared.append((parts[self._comm.rank], expected(parts, residual)))
            generator = torch.Generator().manual_seed(self._comm.rank)
            random = torch.randn(rows, width, generator=generator).to(self._device, self._dtype)
            part = torch.empty_like(random)

        def ask(call: Callable[[], tuple[Tensor, ...]], turn: int) -> str | None:
            mine, wanted = prepared[turn]
            part.copy_(mine)
            got = call()
            self._wait()
            return self._difference(got, wanted)

        def ask_recorded() -> str | None:
            recording = Recording(lambda: work(part, residual), device=self._device, count=self._comm.count)
            faults = [ask(recording.replay, turn) for turn in (1, 2)]
            return faults[0] or faults[1]

        fault = _tried(prepare)
        if all_reasons(self._comm, fault):
            return fault
        faults = [_tried(lambda: ask(lambda: work(part, residual), 0))]
        if self._device.type == "cuda":
            faults.append(_tried(ask_recorded))
        part.copy_(random)
        faults.append(self._disagreement(lambda: work(part, residual)))
        return next((fault for fault in faults if fault is not None), None)

    def _whole_numbers(self, rows: int, width: int, seed: int) -> Tensor:
        """From -4 to 4: of 32 ranks and a residual the sum is at most 132, and exact in every dtype."""
        places = torch.arange(rows * width, device=self._device).view(rows, width)
        return ((places * 7 + places // width * 3 + seed * 5) % 9 - 4).to(self._dtype)

    def _difference(self, got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> str | None:
        if len(got) == 2 and got[0].shape == got[1].shape == wanted[0].shape:  # normed, summed
            close = torch.isclose(got[0].float(), wanted[0].float(), rtol=_TOLERANCE[self._dtype], atol=1e-6)
            if not bool(close.all()):
                return f"{int((~close).sum())} of {close.numel()} numbers of the norm are wrong"
            got, wanted = got[1:], wanted[1:]
        for have, want in zip(got, wanted, strict=True):
            if not torch.equal(have, want):
                return f"{int((have != want).sum())} of {want.numel()} numbers are wrong"
        return None

    def _disagreement(self, call: Callable[[], tuple[Tensor, ...]]) -> str | None:
        """Compares all ranks' bits, by sums weighted with their places. A rank whose call fails is compared too: the
        others wait for it."""
        sums = torch.zeros(_MOST_RESULTS, dtype=torch.int64)

        def work() -> None:
            got = call()
            self._wait()
            for place, tensor in enumerate(got):
                sums[place] = _digest(tensor)

        fault = _tried(work)
        others = self._comm.gather_on_host(sums)
        different = [rank for rank in range(self._comm.world_size) if not torch.equal(others[rank], others[0])]
        if fault is None and different:
            fault = f"ranks {', '.join(map(str, different))} have other bits than rank 0"
        return fault

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._comm.check()


def _tried(check: Callable[[], str | None]) -> str | None:
    """An exception is a fault like another: the ranks stay in step."""
    try:
        return check()
    except Exception as error:
        _log.exception("certificate")
        return describe(error)


def _digest(tensor: Tensor) -> Tensor:
    bits = tensor.contiguous().view(torch.int32 if tensor.itemsize == 4 else torch.int16).flatten().to(torch.int64)
    return (bits * (torch.arange(bits.shape[0], device=bits.device) * 2 + 1)).sum()
