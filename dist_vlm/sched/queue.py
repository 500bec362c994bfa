"""Requests in the order in which they are served."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from dist_vlm.sched.request import Request


class RequestQueue:
    """Ascending by priority, then by arrival: a preempted request comes back to its old place."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """Over the requests of now, whatever is added or removed meanwhile."""
        return iter(tuple(self._requests))

    @property
    def first(self) -> Request:
        return self._requests[0]

    @property
    def last(self) -> Request:
        return self._requests[-1]

    def add(self, request: Request) -> None:
        insort(self._requests, request, key=lambda one: one.order)

    def remove(self, request: Request) -> None:
        """Raises `ValueError` if the request is not in the queue."""
        index = bisect_left(self._requests, request.order, key=lambda one: one.order)
        if index == len(self._requests) or self._requests[index] is not request:
            raise ValueError(f"request {request.request_id!r} is not in this queue")
        del self._requests[index]
