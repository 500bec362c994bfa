"""Locks for objects that several threads may be given at the same time and that have none of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ObjectLocks:
    """One lock for each object that is held or waited for, by its identity; nothing is kept of others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[int, threading.Lock] = {}
        self._num_users: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._locks)

    @contextmanager
    def holding(self, thing: object) -> Iterator[None]:
        """Waits until no other thread holds `thing`, and holds it."""
        key = id(thing)
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
            self._num_users[key] = self._num_users.get(key, 0) + 1
        try:
            with lock:
                yield
        finally:
            with self._lock:
                self._num_users[key] -= 1
                if not self._num_users[key]:
                    del self._num_users[key], self._locks[key]
