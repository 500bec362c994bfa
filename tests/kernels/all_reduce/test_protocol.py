"""All interleavings of two and three ranks through successive calls: the protocol of `dist_vlm.kernels.all_reduce`.

Each rank has three buffers of places, and a place holds nothing, or a number that says which call it is of. In a call a
rank has three threads: one sends, one looks at the rank's places, one empties the buffer of the call before. They go on
in any order against each other, which allows more than a kernel's programs do, and the call ends when all have. A send
goes to one place of one rank, an emptying and a look are of one place, and each of these is atomic. A look waits until
something is there.

A violation is a look that finds the number of another call, or a number that lands on one that still is there; a state
that no rank can leave is one too. A rank that has ended all calls has seen the right parts in each, and only those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import pytest

# Two shots of a single row: the other ranks look for no part, and send no sum.
ONE, TWO, ROW = "one shot", "two shots", "one row"
# Any four kinds in a row, of one and two shots: a buffer is used again in the fourth.
EVERY_ORDER = [TWO if digit == "2" else ONE for digit in "1111222212211212111"]


@pytest.fixture(autouse=True)
def can_run() -> None:
    """Needs no device."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The protocol, and ways to spoil it.

    emptied: whose call's buffer a call empties, None for none. looks_for: whether a rank waits in a call for what
    another has sent. sends_to: whether a rank sends another what it needs.
    """

    buffers: int = 3
    emptied: Callable[[int], int | None] = lambda call: call - 1
    looks_for: Callable[[int, int, int], bool] = lambda call, rank, other: True
    sends_to: Callable[[int, int, int], bool] = lambda call, rank, other: True


@dataclasses.dataclass(frozen=True)
class Call:
    """What a rank does in a call. sends: to which rank's place, after how many looks. used: places of a buffer."""

    sends: Sequence[tuple[int, int, int]]
    looks: Sequence[int]
    used: int

    @classmethod
    def of(cls, protocol: Protocol, kind: str, call: int, rank: int, ranks: int) -> Call:
        """Places: the parts in rank order, then, with two shots, the sums. Row r is added up by rank r."""
        rows = {ONE: 0, TWO: ranks, ROW: 1}[kind]
        looks = [other for other in range(ranks) if protocol.looks_for(call, rank, other)] if rank < rows else []
        sends = [(row, rank, 0) for row in range(rows)]
        if kind == ONE:
            looks = [other for other in range(ranks) if protocol.looks_for(call, rank, other)]
            sends = [(other, rank, 0) for other in range(ranks)]
        elif rank < rows:
            sends += [(other, ranks + rank, len(looks)) for other in range(ranks)]
        looks += [ranks + row for row in range(rows) if protocol.looks_for(call, rank, row)]
        sends = [send for send in sends if protocol.sends_to(call, rank, send[0])]
        return cls(sends, looks, ranks + rows)


class Model:
    """kinds: of the calls. reduced: a look that need not wait comes before all else, and a buffer is emptied at once;
    `run` and `_empties` say why that hides no violation.

    A rank's state: its call, what it has sent as bits, the looks it has had, the places it has emptied. A number is a
    byte: 0 for none, else its call and its place.
    """

    def __init__(self, protocol: Protocol, ranks: int, kinds: Sequence[str], *, reduced: bool = False) -> None:
        self._ranks, self._buffers, self._reduced = ranks, protocol.buffers, reduced
        self._places = 2 * ranks
        self._calls = [
            [Call.of(protocol, kind, call, rank, ranks) for rank in range(ranks)] for call, kind in enumerate(kinds)
        ]
        # The buffer that a call empties, as one of its calls, and how many places of it.
        self._last = [protocol.emptied(call) for call in range(len(kinds))]
        self._to_empty = [0 if last is None or last < 0 else self._calls[last][0].used for last in self._last]
        self.num_states = 0

    def run(self) -> str | None:
        """What goes wrong in some interleaving, None where nothing does in any.

        Reduced: a look changes no place, and what it finds stays there until its rank's next call. It could find
        something else later if a number landed there, but that is a violation of its own.
        """
        start = (((0, 0, 0, 0),) * self._ranks, bytes(self._ranks * self._buffers * self._places))
        states = {start}
        while states:  # all that are so many steps away
            self.num_states += len(states)
            following = set()
            for state in states:
                after: list = []
                for found in self._moves(*state):
                    if isinstance(found, str):
                        return found
                    is_look, changed = found
                    if is_look and self._reduced:
                        after = [changed]
                        break
                    after.append(changed)
                if not after and any(call < len(self._calls) for call, *_ in state[0]):
                    return f"no rank can go on: {state[0]}"
                following.update(after)
            states = following
        return None

    def _moves(self, at: tuple, memory: bytes) -> Iterator[str | tuple[bool, tuple]]:
        for move in (self._looks, self._sends, self._empties):
            for rank, (call, *_) in enumerate(at):
                if call < len(self._calls):
                    yield from move(rank, at, memory)

    def _looks(self, rank: int, at: tuple, memory: bytes) -> Iterator[str | tuple[bool, tuple]]:
        call, sent, looked, emptied = at[rank]
        looks = self._calls[call][rank].looks
        if looked == len(looks):
            return
        found = memory[self._index(rank, call, looks[looked])]
        if found == self._number(call, looks[looked]):
            yield True, self._moved(at, rank, (call, sent, looked + 1, emptied), memory)
        elif found:
            yield f"rank {rank} looks for {looks[looked]} of call {call}, and finds {self._name(found)}"

    def _sends(self, rank: int, at: tuple, memory: bytes) -> Iterator[str | tuple[bool, tuple]]:
        """In any order, of those that may be sent."""
        call, sent, looked, emptied = at[rank]
        for number, (to, place, after) in enumerate(self._calls[call][rank].sends):
            if sent >> number & 1 or looked < after:
                continue
            index = self._index(to, call, place)
            if memory[index]:
                old = self._name(memory[index])
                yield f"rank {rank} sends {place} of call {call} to rank {to}, where {old} still is"
                return
            changed = memory[:index] + bytes([self._number(call, place)]) + memory[index + 1 :]
            yield False, self._moved(at, rank, (call, sent | 1 << number, looked, emptied), changed)

    def _empties(self, rank: int, at: tuple, memory: bytes) -> Iterator[tuple[bool, tuple]]:
        """Place by place. Reduced: all at once, since only steps of the same place tell when it was emptied."""
        call, sent, looked, emptied = at[rank]
        if emptied == self._to_empty[call]:
            return
        count = self._to_empty[call] if self._reduced else 1
        index = self._index(rank, self._last[call], emptied)
        changed = memory[:index] + bytes(count) + memory[index + count :]
        yield False, self._moved(at, rank, (call, sent, looked, emptied + count), changed)

    def _moved(self, at: tuple, rank: int, to: tuple[int, int, int, int], memory: bytes) -> tuple:
        call, sent, looked, emptied = to
        steps = self._calls[call][rank]
        if sent + 1 == 1 << len(steps.sends) and looked == len(steps.looks) and emptied == self._to_empty[call]:
            to = (call + 1, 0, 0, 0)
        return (*at[:rank], to, *at[rank + 1 :]), memory

    def _index(self, rank: int, call: int, place: int) -> int:
        return (rank * self._buffers + call % self._buffers) * self._places + place

    def _number(self, call: int, place: int) -> int:
        return 1 + call * self._places + place

    def _name(self, number: int) -> str:
        call, place = divmod(number - 1, self._places)
        return f"{place} of call {call}"


def test_the_long_sequence_has_any_four_kinds_in_a_row() -> None:
    assert len({tuple(EVERY_ORDER[start : start + 4]) for start in range(len(EVERY_ORDER) - 3)}) == 2**4


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize(
    "kinds", [EVERY_ORDER, [ROW] * 6, [ROW, ONE, ROW, TWO, ROW, ROW, TWO, ONE, ONE, ROW]], ids=["long", "row", "mixed"]
)
def test_no_interleaving_of_two_ranks_goes_wrong(kinds, reduced) -> None:
    model = Model(Protocol(), 2, kinds, reduced=reduced)
    assert model.run() is None
    assert model.num_states > (50 if reduced else 100) * len(kinds)


@pytest.mark.parametrize(
    "kinds", [EVERY_ORDER, [ROW] * 6, [ROW, ONE, ROW, TWO, ROW, ROW, ONE, ONE, ROW]], ids=["long", "row", "mixed"]
)
def test_no_interleaving_of_three_ranks_goes_wrong(kinds) -> None:
    model = Model(Protocol(), 3, kinds, reduced=True)
    assert model.run() is None
    assert model.num_states > 300 * len(kinds)


def test_a_fourth_buffer_allows_to_empty_later() -> None:
    later = Protocol(buffers=4, emptied=lambda call: call - 2)
    assert Model(later, 2, [ONE, TWO] * 3).run() is None


FAULTS = [
    (Protocol(buffers=2), 3, "still is"),
    (Protocol(emptied=lambda call: call), 1, "no rank can go on"),
    (Protocol(emptied=lambda call: call - 2), 4, "still is"),
    (Protocol(emptied=lambda call: None), 4, "finds 0 of call 0"),
    # A rank that needs nothing of another is soon too far ahead, be it in a single call.
    (Protocol(looks_for=lambda call, rank, other: (rank, other) != (1, 0)), 4, "still is"),
    (Protocol(looks_for=lambda call, rank, other: (call, rank, other) != (2, 1, 0)), 4, "rank 1 sends 1 of call 3 to"),
    (Protocol(sends_to=lambda call, rank, other: (call, rank, other) != (1, 0, 1)), 2, "no rank can go on"),
]


@pytest.mark.parametrize(("kind", "ranks"), [(ONE, 2), (TWO, 2), (ONE, 3)])
@pytest.mark.parametrize(
    ("fault", "calls", "message"),
    FAULTS,
    ids=["two-buffers", "own-emptied", "emptied-late", "never-emptied", "one-not-needed", "in-one-call", "not-sent"],
)
def test_a_planted_fault_is_found(fault, calls, message, ranks, kind) -> None:
    """In so many calls and no fewer."""
    assert message in str(Model(fault, ranks, [kind] * calls, reduced=ranks > 2).run())
    assert Model(fault, ranks, [kind] * (calls - 1), reduced=ranks > 2).run() is None


def test_with_two_shots_a_third_rank_stands_for_one_that_is_not_waited_for() -> None:
    """Its sum has the part of the other."""
    kinds = [ONE, ONE, TWO, ONE]
    fault = Protocol(looks_for=lambda call, rank, other: (call, rank, other) != (2, 1, 0))
    assert "still is" in str(Model(fault, 2, kinds, reduced=True).run())
    assert Model(fault, 3, kinds, reduced=True).run() is None
