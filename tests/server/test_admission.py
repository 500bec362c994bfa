"""Seats: no more than there are, all of them free again however a request ends."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from dist_vlm.server import admission as admission_module
from dist_vlm.server.admission import Admission
from dist_vlm.server.errors import ApiError


def refused(work: Callable[[], object]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        work()
    return caught.value


def enter(admission: Admission) -> None:
    with admission.enter():
        pass


def test_one_more_than_there_are_seats_is_told_to_come_back() -> None:
    admission = Admission(max_seats=3, num_running=2)
    with ExitStack() as inside:
        for number in range(1, 4):
            inside.enter_context(admission.enter())
            assert admission.num_taken == number
        error = refused(lambda: enter(admission))
        assert (error.status, error.code) == (429, "queue_full")
        assert "3 answers are in work or waiting, of at most 3" in error.message
        assert int(error.headers["Retry-After"]) >= 1
        assert admission.num_taken == 3
    assert admission.num_taken == 0
    enter(admission)


def test_a_seat_counts_for_as_many_as_it_grew_to() -> None:
    admission = Admission(max_seats=10, num_running=2)
    with admission.enter() as first, admission.enter() as second:
        first.grow(6)
        assert admission.num_taken == 7
        first.grow(6)
        assert admission.num_taken == 7, "its size, not what is added"
        second.grow(4)
        assert (admission.num_taken, first.size, second.size) == (10, 6, 4)
        first.grow(2)
        assert admission.num_taken == 6
    assert admission.num_taken == 0


def test_growing_where_there_is_no_room_is_a_429_and_takes_nothing() -> None:
    admission = Admission(max_seats=4, num_running=2)
    with admission.enter() as first:
        first.grow(3)
        with pytest.raises(ApiError) as caught, admission.enter() as second:
            second.grow(2)
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        assert admission.num_taken == 3
        error = refused(lambda: first.grow(5))
        assert error.status == 400, "that many there never are"
        assert first.size == 3
        first.grow(4)
    assert admission.num_taken == 0


def test_more_answers_than_there_ever_are_seats_are_a_400() -> None:
    admission = Admission(max_seats=4, num_running=2)
    with pytest.raises(ApiError) as caught, admission.enter() as seat:
        seat.grow(5)
    assert (caught.value.status, caught.value.code) == (400, "too_many_answers")
    assert "asks for 5 answers; at most 4" in caught.value.message
    assert admission.num_taken == 0


@pytest.mark.parametrize("error", [ValueError(), ApiError(400, "x"), asyncio.CancelledError(), KeyboardInterrupt()])
def test_a_seat_is_free_again_whatever_happens(error: BaseException) -> None:
    admission = Admission(max_seats=4, num_running=2)

    def fail() -> None:
        with admission.enter() as seat:
            seat.grow(3)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert admission.num_taken == 0


def visit(admission: Admission, size: int) -> Iterator[None]:
    """A request that is inside until it is closed."""
    with admission.enter() as seat:
        seat.grow(size)
        yield


def test_no_seat_is_lost_or_found_in_any_order() -> None:
    chance = random.Random(0)
    admission = Admission(max_seats=12, num_running=4)
    inside: list[tuple[Iterator[None], int]] = []
    statuses: Counter[int] = Counter()
    for _ in range(3000):
        taken = sum(size for _, size in inside)
        assert admission.num_taken == taken <= 12
        if inside and chance.random() < 0.45:
            visitor, _ = inside.pop(chance.randrange(len(inside)))
            next(visitor, None)
            continue
        size = chance.randint(1, 14)
        visitor = visit(admission, size)
        expected = 200 if taken + size <= 12 else 400 if size > 12 and taken < 12 else 429
        statuses[expected] += 1
        if expected == 200:
            next(visitor)
            inside.append((visitor, size))
        else:
            assert refused(lambda visitor=visitor: next(visitor)).status == expected
    assert min(statuses[status] for status in (200, 400, 429)) > 50
    for visitor, _ in inside:
        next(visitor, None)
    assert admission.num_taken == 0


# --------------------------------------------------------------------- drain


def test_while_draining_nobody_comes_in_and_those_inside_may_grow_and_leave() -> None:
    async def main() -> None:
        admission = Admission(max_seats=4, num_running=2)
        with admission.enter() as first:
            second = visit(admission, 1)
            next(second)
            draining = asyncio.create_task(admission.drain())
            await asyncio.sleep(0)
            assert admission.is_draining
            error = refused(lambda: enter(admission))
            assert (error.status, error.code) == (503, "shutting_down")
            assert "Retry-After" in error.headers
            first.grow(3)
            next(second, None)
            await asyncio.sleep(0.01)
            assert not draining.done()
            assert admission.num_taken == 3
        await asyncio.wait_for(draining, 1)
        assert admission.num_taken == 0
        assert refused(lambda: enter(admission)).status == 503, "it stays closed"

    asyncio.run(main())


def test_an_empty_server_is_drained_at_once_and_so_is_one_that_was_full() -> None:
    async def main() -> None:
        await asyncio.wait_for(Admission(max_seats=4, num_running=2).drain(), 1)
        admission = Admission(max_seats=4, num_running=2)
        for _ in range(3):
            enter(admission)
        await asyncio.wait_for(admission.drain(), 1)
        assert admission.is_draining
        assert admission.num_taken == 0

    asyncio.run(main())


def test_a_drain_that_is_given_up_still_lets_nobody_in() -> None:
    async def main() -> None:
        admission = Admission(max_seats=4, num_running=2)
        with admission.enter():
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(admission.drain(), 0.01)
            assert refused(lambda: enter(admission)).status == 503

    asyncio.run(main())


# --------------------------------------------------------------- Retry-After


def test_how_long_to_wait_follows_from_how_long_requests_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded below by a second, above by a minute."""
    now = 0.0
    monkeypatch.setattr(admission_module.time, "monotonic", lambda: now)
    admission = Admission(max_seats=8, num_running=2)

    def wait_s() -> int:
        with ExitStack() as inside:
            for _ in range(8):
                inside.enter_context(admission.enter())
            return refused(lambda: enter(admission)).retry_after_s or 0

    def take(seconds: float) -> None:
        nonlocal now
        for _ in range(100):
            with admission.enter():
                now += seconds

    take(4)
    assert wait_s() == 8, "of four rounds of four seconds, half have passed on average"
    take(0.001)
    assert wait_s() == 1
    take(1000)
    assert wait_s() == 60
