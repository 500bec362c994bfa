"""All interleavings of two and three ranks through successive calls: the protocol of kernels/shared_memory.h.

A rank is a list of atomic steps. Writing and reading take two steps each, a beginning and an end, so that any overlap
of one with another is some interleaving of them. A violation is a read of what is not there yet, or not there any more;
a state in which no rank can go on is one too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

BUSY = "busy"


@dataclass(frozen=True)
class Step:
    """kind: "begin_write", "end_write", "begin_read", "end_read", "arrive" or "wait".

    places: (buffer, slot, share); tag: what is written, or must be read; rank, count: whose arrivals are waited for.
    """

    kind: str
    places: tuple[tuple[int, int, int], ...] = ()
    tag: tuple = ()
    rank: int = -1
    count: int = 0


@dataclass(frozen=True)
class Protocol:
    """The protocol, and ways to spoil it."""

    buffers: int = 2
    waits_for: Callable[[int, int], bool] = lambda rank, other: True
    second_meeting: bool = True
    norm_share: Callable[[int, int], int] = lambda rank, ranks: rank

    def program(self, rank: int, ranks: int, calls: tuple[str, ...]) -> list[Step]:
        steps: list[Step] = []
        arrivals = 0
        others = [other for other in range(ranks) if other != rank]

        def write(places: list[tuple[int, int, int]], tag: tuple) -> None:
            steps.extend(Step(kind, tuple(places), tag) for kind in ("begin_write", "end_write"))

        def read(places: list[tuple[int, int, int]], tag: tuple) -> None:
            steps.extend(Step(kind, tuple(places), tag) for kind in ("begin_read", "end_read"))

        def meet() -> None:
            nonlocal arrivals
            arrivals += 1
            steps.append(Step("arrive"))
            steps.extend(Step("wait", rank=other, count=arrivals) for other in others if self.waits_for(rank, other))

        for call, kind in enumerate(calls):
            buffer = call % self.buffers
            if kind == "one shot":
                write([(buffer, rank, share) for share in range(ranks)], (call, rank, "part"))
                meet()
                for other in others:
                    read([(buffer, other, share) for share in range(ranks)], (call, other, "part"))
                continue
            write([(buffer, rank, share) for share in others], (call, rank, "part"))
            meet()
            for other in others:
                read([(buffer, other, rank)], (call, other, "part"))
            write([(buffer, rank, rank)], (call, rank, "sum"))
            write([(buffer, (rank + 1) % ranks, self.norm_share(rank, ranks))], (call, rank, "norm"))
            if self.second_meeting:
                meet()
            for other in others:
                read([(buffer, other, other)], (call, other, "sum"))
                read([(buffer, (other + 1) % ranks, self.norm_share(other, ranks))], (call, other, "norm"))
        return steps


def violation(protocol: Protocol, ranks: int, calls: tuple[str, ...]) -> str | None:
    """What goes wrong in some interleaving, or None where nothing does in any."""
    programs = [protocol.program(rank, ranks, calls) for rank in range(ranks)]
    places = list(itertools.product(range(2), range(ranks), range(ranks)))
    index = {place: i for i, place in enumerate(places)}
    start = ((0,) * ranks, (0,) * ranks, (None,) * len(places))
    seen, waiting = {start}, [start]
    while waiting:
        at, arrivals, memory = waiting.pop()
        moved = False
        for rank, program in enumerate(programs):
            if at[rank] == len(program):
                continue
            step = program[at[rank]]
            counts, cells = arrivals, memory
            if step.kind == "wait" and arrivals[step.rank] < step.count:
                continue
            moved = True
            if step.kind == "arrive":
                counts = (*arrivals[:rank], arrivals[rank] + 1, *arrivals[rank + 1 :])
            elif step.kind.endswith("write"):
                changed = list(memory)
                for place in step.places:
                    changed[index[place]] = BUSY if step.kind == "begin_write" else step.tag
                cells = tuple(changed)
            elif step.kind.endswith("read"):
                for place in step.places:
                    if memory[index[place]] != step.tag:
                        return f"rank {rank} wants {step.tag} at {place} and finds {memory[index[place]]}"
            state = ((*at[:rank], at[rank] + 1, *at[rank + 1 :]), counts, cells)
            if state not in seen:
                seen.add(state)
                waiting.append(state)
        if not moved and any(at[rank] < len(program) for rank, program in enumerate(programs)):
            return f"no rank can go on at {at}"
    return None


def sequences(length: int) -> list[tuple[str, ...]]:
    return list(itertools.product(("one shot", "two shots"), repeat=length))


@pytest.mark.parametrize("calls", sequences(4), ids="-".join)
def test_no_interleaving_of_two_ranks_goes_wrong(calls) -> None:
    assert violation(Protocol(), 2, calls) is None


@pytest.mark.parametrize("calls", sequences(4), ids="-".join)
def test_no_interleaving_of_three_ranks_goes_wrong(calls) -> None:
    assert violation(Protocol(), 3, calls) is None


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("fault", "calls", "message"),
    [
        (Protocol(buffers=1), ("one shot", "one shot"), "and finds"),
        (Protocol(buffers=1), ("two shots", "two shots"), "and finds"),
        (Protocol(buffers=1), ("two shots", "one shot"), "and finds"),
        (Protocol(waits_for=lambda rank, other: False), ("one shot",), "and finds None"),
        (Protocol(waits_for=lambda rank, other: rank != 1 or other != 0), ("one shot",), "rank 1 wants"),
        (Protocol(second_meeting=False), ("two shots",), "and finds"),
        (Protocol(norm_share=lambda rank, ranks: (rank + 1) % ranks), ("two shots",), "and finds"),
    ],
)
def test_a_planted_fault_is_found(ranks, fault, calls, message) -> None:
    if (fault.buffers, calls, ranks) == (1, ("two shots", "two shots"), 2):
        assert violation(fault, ranks, calls) is None  # what a rank writes first is what it alone has read last
        return
    assert message in violation(fault, ranks, calls)


def test_a_rank_that_calls_less_leaves_the_other_waiting() -> None:
    class Short(Protocol):
        def program(self, rank, ranks, calls):
            return super().program(rank, ranks, calls[:-1] if rank == 0 else calls)

    assert "no rank can go on" in violation(Short(), 2, ("one shot", "one shot"))


# Sleeping: a rank that waits sleeps without a time limit here, so an arrival that fails to wake it shows as a state
# that nothing leaves. A state: (where the waiter is, what it saw, where the waker is, what it saw, arrivals, sleepers).


def moves(state: tuple, *, checks_first: bool, compares: bool) -> Iterator[tuple]:
    waiter, seen, waker, counted, arrivals, sleepers = state
    if waiter == "look":
        yield ("done" if arrivals else "announce", arrivals, waker, counted, arrivals, sleepers)
    elif waiter == "announce":
        yield ("sleep", seen, waker, counted, arrivals, sleepers + 1)
    elif waiter == "sleep":
        stays = not compares or arrivals == seen  # the kernel compares and goes to sleep in one step
        yield ("asleep" if stays else "up", seen, waker, counted, arrivals, sleepers)
    elif waiter == "up":
        yield ("look", seen, waker, counted, arrivals, sleepers - 1)
    order = ("count", "arrive", "wake") if checks_first else ("arrive", "count", "wake")
    following = dict(zip(order, (*order[1:], "done"), strict=True))
    if waker == "arrive":
        yield (waiter, seen, following[waker], counted, arrivals + 1, sleepers)
    elif waker == "count":
        yield (waiter, seen, following[waker], sleepers, arrivals, sleepers)
    elif waker == "wake":
        woken = "up" if counted and waiter == "asleep" else waiter
        yield (woken, seen, "done", counted, arrivals, sleepers)


def stuck_states(*, checks_first: bool = False, compares: bool = True) -> list[tuple]:
    start = ("look", 0, "count" if checks_first else "arrive", 0, 0, 0)
    seen, waiting, stuck = {start}, [start], []
    while waiting:
        state = waiting.pop()
        following = list(moves(state, checks_first=checks_first, compares=compares))
        if not following and state[0] != "done":
            stuck.append(state)
        for after in following:
            if after not in seen:
                seen.add(after)
                waiting.append(after)
    assert any(state[0] == "done" for state in seen)
    return stuck


def test_no_arrival_is_slept_through() -> None:
    assert stuck_states() == []


@pytest.mark.parametrize("fault", [{"checks_first": True}, {"compares": False}])
def test_a_planted_fault_is_slept_through(fault) -> None:
    assert stuck_states(**fault)
