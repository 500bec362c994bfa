"""Which images the ranks hold for which requests, from a request's arrival to its end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

from dist_vlm.engine.messages import EngineRequest
from dist_vlm.executor.base import Executor


class StagingArea:
    """Stages each image once, however many requests share it, and tells when a request's images have all arrived.

    An image stays staged until its last request has ended: a preempted request encodes again.

    timeout_s: how long a request waits for its images before it fails.
    """

    def __init__(self, executor: Executor, *, timeout_s: float = 60.0) -> None:
        self._timeout_s = timeout_s
        self._waiting_since: dict[str, float] = {}
        self._executor = executor
        self._users: dict[str, set[str]] = {}
        self._arrived: set[str] = set()
        self._failed: set[str] = set()
        self._bytes: dict[str, int] = {}
        self._num_bytes = 0
        self._waiting: dict[str, tuple[EngineRequest, set[str]]] = {}
        self._unstage_after: deque[tuple[int, str]] = deque()

    @property
    def num_waiting(self) -> int:
        """Requests whose images are still on their way."""
        return len(self._waiting)

    @property
    def num_staged(self) -> int:
        return len(self._users)

    @property
    def num_bytes(self) -> int:
        """Bytes of all images staged or on their way."""
        return self._num_bytes

    def is_waiting(self, request_id: str) -> bool:
        """Whether images of the request are still on their way."""
        return request_id in self._waiting

    def add(self, request: EngineRequest) -> bool:
        """Begins to stage a request's images; true if they have all arrived already."""
        missing = set()
        for image in request.images:
            key = image.span.image
            if key in self._failed:
                self._forget(key)  # tried once more
            if key not in self._users:
                self._users[key] = set()
                self._bytes[key] = image.array.nbytes
                self._num_bytes += image.array.nbytes
                self._executor.stage(key, image.kind, image.array)
            self._users[key].add(request.request_id)
            if key not in self._arrived:
                missing.add(key)
        if missing:
            self._waiting[request.request_id] = (request, missing)
            self._waiting_since[request.request_id] = time.monotonic()
        return not missing

    def poll(self) -> tuple[list[EngineRequest], list[tuple[EngineRequest, str]]]:
        """Requests that may run now, and requests that cannot, with the cause. Does not block."""
        ready, failed = [], []
        for staged in self._executor.poll_staged():
            (self._arrived if staged.error is None else self._failed).add(staged.key)
            for request_id, (request, missing) in list(self._waiting.items()):
                if staged.key not in missing:
                    continue
                missing.discard(staged.key)
                if staged.error is not None:
                    self.withdraw(request_id)
                    failed.append((request, staged.error))
                elif not missing:
                    self.withdraw(request_id)
                    ready.append(request)
        late = time.monotonic() - self._timeout_s
        for request_id, (request, missing) in list(self._waiting.items()):
            if self._waiting_since[request_id] < late:
                self.withdraw(request_id)
                failed.append((request, f"{len(missing)} image(s) did not reach the ranks in {self._timeout_s:g} s"))
        return ready, failed

    def withdraw(self, request_id: str) -> bool:
        """Takes a request out of the queue for its images; false if it is not in it."""
        self._waiting_since.pop(request_id, None)
        return self._waiting.pop(request_id, None) is not None

    def end(self, request_id: str, keys: Iterable[str], last_step_id: int) -> None:
        """A request has ended: its images may go, once step `last_step_id` (-1: none) has been collected."""
        for key in set(keys):
            users = self._users.get(key, set())
            users.discard(request_id)
            if not users:
                self._unstage_after.append((last_step_id, key))

    def collected(self, step_id: int) -> None:
        """Unstages what no request wants and no plan in flight may name: all steps up to `step_id` are collected."""
        while self._unstage_after and self._unstage_after[0][0] <= step_id:
            _, key = self._unstage_after.popleft()
            if key in self._users and not self._users[key]:
                self._forget(key)

    def _forget(self, key: str) -> None:
        del self._users[key]
        self._num_bytes -= self._bytes.pop(key)
        self._arrived.discard(key)
        self._failed.discard(key)
        self._executor.unstage(key)
