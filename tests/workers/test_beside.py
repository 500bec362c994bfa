import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from dist_vlm.workers.beside import run_beside


@pytest.fixture
def helpers():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def test_results_come_in_the_order_of_the_tasks(helpers):
    tasks = [partial(pow, 2, exponent) for exponent in range(6)]
    for threads in (None, helpers):
        assert run_beside(threads, tasks) == [1, 2, 4, 8, 16, 32]
        assert run_beside(threads, []) == []


def test_tasks_run_at_the_same_time(helpers):
    """Each waits for the others: one after the other, none would end."""
    together = threading.Barrier(3, timeout=10)
    assert sorted(run_beside(helpers, [together.wait] * 3)) == [0, 1, 2]


def test_what_busy_helpers_have_not_begun_is_done_here(helpers):
    free = threading.Event()
    for _ in range(2):
        helpers.submit(free.wait, 10)
    assert run_beside(helpers, [threading.get_ident] * 3) == [threading.get_ident()] * 3
    free.set()


def test_a_helper_may_share_its_own_work_with_the_others(helpers):
    def nested():
        return run_beside(helpers, [partial(pow, 3, 2)] * 3)

    futures = [helpers.submit(nested) for _ in range(20)]
    assert [future.result(10) for future in futures] == [[9, 9, 9]] * 20


@pytest.mark.parametrize("guilty", range(3))
def test_an_exception_is_the_callers(helpers, guilty):
    tasks = [partial(int, "x" if place == guilty else "7") for place in range(3)]
    for threads in (None, helpers):
        with pytest.raises(ValueError, match="'x'"):
            run_beside(threads, tasks)
