"""Work shared with other threads as far as they have time for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any


def run_beside(helpers: Executor | None, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """Calls every task and returns what they return, in their order.

    helpers: threads that may take any but the first. A task that none of them has begun when it is wanted is called
        here, so that a helper too may share its own work, and full ones hold nothing up. None: all are called here.

    Raises what the first that fails does; others may still be running then.
    """
    if helpers is None or not tasks:
        return [task() for task in tasks]
    futures = [helpers.submit(task) for task in tasks[1:]]
    try:
        done = {0: tasks[0]()}
        for place, future in enumerate(futures, start=1):
            if future.cancel():
                done[place] = tasks[place]()
        return [done[place] if place in done else futures[place - 1].result() for place in range(len(tasks))]
    finally:
        for future in futures:
            future.cancel()
