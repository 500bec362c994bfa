"""A step in two halves: while the parts of one are added up over the ranks, the other is computed.

A forward is a generator: it yields each sum over the ranks that it needs, and is sent what `reduce_add_norm` makes of
it. Run alone, every sum is made at once. Of two, each is computed up to its next sum in turn; the first half's tokens
come before the second's, so what the second attends to is in the cache by then. All ranks make the same sums in the
same order.

The idea of cutting a batch so that one part computes while the other communicates: Zhu et al., "NanoFlow", 2024; Gond
et al., "TokenWeave", 2025.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from dist_vlm.workers.plan import Slice

# Where there are enough tokens, the first half is of whole tiles of a matrix product.
_TILE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Reduction:
    """What `Communicator.reduce_add_norm` is to be called with. norm: the weight, [hidden_size]."""

    partial: Tensor
    residual: Tensor | None
    norm: Tensor


Reduced: TypeAlias = tuple[Tensor, Tensor]  # the normed sum, and the sum
Reduce: TypeAlias = Callable[[Reduction], Reduced]
Halves: TypeAlias = tuple[Sequence[Slice], Sequence[Slice]]
Forward: TypeAlias = Generator[Reduction, Reduced, Tensor]


class Beside:
    """Runs work beside what the caller enqueues next: on a GPU on a stream of its own, elsewhere at once.

    Memory: what the work reads is kept until its end is waited for. What it allocates belongs to its stream and is
    only written by later work there, which begins after all that the caller has enqueued, its readers among it.
    """

    def __init__(self, device: torch.device) -> None:
        # Ahead of the other half's kernels wherever both wait for a place: a sum is short, and wanted first.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def start(self, work: Callable[[], Reduced]) -> Callable[[], Reduced]:
        """Enqueues the work; what is returned makes the caller's stream wait for it and gives its result."""
        if self._stream is None:
            result = work()
            return lambda: result
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = work()
            done = self._stream.record_event()

        def wait(read: Callable[[], Reduced] = work) -> Reduced:  # `read` keeps the tensors that the work reads
            torch.cuda.current_stream().wait_event(done)
            return result

        return wait


def cut(slices: Sequence[Slice], *, min_tokens: int) -> Halves | None:
    """The slices of a step as two runs of about as many tokens; a slice between them is cut, and samples in the second.
    None where the step has fewer than `min_tokens` tokens, or one."""
    num_tokens = sum(piece.count for piece in slices)
    if num_tokens < max(2, min_tokens):
        return None
    left = num_tokens // 2
    if left > _TILE_TOKENS:
        left -= left % _TILE_TOKENS
    first: list[Slice] = []
    for index, piece in enumerate(slices):
        if piece.count > left:
            second = list(slices[index:])
            if left:
                first.append(piece._replace(count=left, sample=False))
                second[0] = piece._replace(start=piece.start + left, count=piece.count - left)
            return first, second
        first.append(piece)
        left -= piece.count
    raise AssertionError("the first half is less than the whole")


def run_whole(forward: Forward, reduce: Reduce) -> Tensor:
    """Runs one forward to its end."""
    try:
        wanted = next(forward)
        while True:
            wanted = forward.send(reduce(wanted))
    except StopIteration as end:
        return _result(end)


def run_in_halves(first: Forward, second: Forward, reduce: Reduce, beside: Beside) -> tuple[Tensor, Tensor]:
    """Runs both to their ends, each while the other's sum is made."""
    halves = (first, second)
    results: dict[int, Tensor] = {}
    sums: list[Callable[[], Reduced] | None] = [None, None]
    while len(results) < len(halves):
        for index, half in enumerate(halves):
            if index in results:
                continue
            summed = sums[index]
            try:
                wanted = next(half) if summed is None else half.send(summed())
            except StopIteration as end:
                results[index] = _result(end)
                continue
            sums[index] = beside.start(lambda wanted=wanted: reduce(wanted))  # type: ignore[misc]
    return results[0], results[1]


def _result(end: StopIteration) -> Tensor:
    result: Tensor = end.value
    return result
