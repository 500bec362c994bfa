from __future__ import annotations

import threading
import time

import pytest

from dist_vlm.engine.object_locks import ObjectLocks


def test_one_thread_at_a_time_holds_an_object_and_others_do_not_wait_for_it() -> None:
    locks, shared = ObjectLocks(), object()
    inside, most, lone_waits = 0, 0, []
    counting = threading.Lock()

    def use(lone: object) -> None:
        nonlocal inside, most
        with locks.holding(shared):
            with counting:
                inside += 1
                most = max(most, inside)
            began = time.monotonic()
            with locks.holding(lone):
                lone_waits.append(time.monotonic() - began)
            time.sleep(0.002)
            with counting:
                inside -= 1

    threads = [threading.Thread(target=use, args=(object(),)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert len(lone_waits) == 20
    assert len(locks) == 0, "nothing is kept"


def test_equal_objects_are_not_the_same() -> None:
    locks = ObjectLocks()
    with locks.holding([1]), locks.holding([1]):
        assert len(locks) == 2


def test_an_error_gives_the_object_free() -> None:
    locks, thing = ObjectLocks(), object()
    with pytest.raises(KeyError), locks.holding(thing):
        raise KeyError
    assert len(locks) == 0
    with locks.holding(thing):
        pass
