"""Plans between `submit` and `collect`: which results are still to come, and what must be read or sent for them."""

from __future__ import annotations

import time
from collections import deque

from dist_vlm.executor.agreement import agreed
from dist_vlm.executor.base import ExecutorError
from dist_vlm.executor.transport import Transport
from dist_vlm.workers import wire
from dist_vlm.workers.pending import FinishedSteps
from dist_vlm.workers.plan import StepPlan, StepResult

# A message that launches nothing and is answered with everything that was launched: see `Worker.step`.
_FLUSH = b""


class PlansInFlight:
    """An answer brings what a rank has finished by then, which may be the results of earlier plans, and more of them
    from one rank than from another: so results wait here, by rank, until every rank's is there.

    limit: plans that may be submitted and not collected. The transport must take one message more: a flush.
    """

    def __init__(self, transport: Transport, *, num_ranks: int, limit: int) -> None:
        self._transport = transport
        self._limit = limit
        self._step_ids: deque[int] = deque()
        self._num_unanswered = 0
        self._results: list[deque[StepResult]] = [deque() for _ in range(num_ranks)]

    @property
    def oldest(self) -> int | None:
        """Step id of the plan whose result `collect` returns next."""
        return self._step_ids[0] if self._step_ids else None

    def submit(self, plan: StepPlan) -> None:
        """Raises what `Transport.send` raises."""
        if len(self._step_ids) >= self._limit:
            raise RuntimeError(f"{self._limit} plans are submitted and not collected already")
        self._send(wire.encode(plan))
        self._step_ids.append(plan.step_id)

    def collect(self, timeout_s: float) -> tuple[StepResult, ...]:
        """Every rank's result of the oldest plan, in rank order.

        Raises what `Transport` raises, `WireError`, or `ExecutorError` where the ranks differ.
        """
        end = time.monotonic() + timeout_s
        flushed = False
        while not all(self._results):
            if self._num_unanswered == 0:
                if flushed:
                    rank = next(rank for rank, results in enumerate(self._results) if not results)
                    raise ExecutorError("step", f"rank {rank} has no result for step {self._step_ids[0]}", rank)
                self._send(_FLUSH)
                flushed = True
            self._receive(max(0.0, end - time.monotonic()))
        results = tuple(of_rank.popleft() for of_rank in self._results)
        agreed(results, self._step_ids.popleft())
        return results

    def _send(self, message: bytes) -> None:
        self._transport.send(message)
        self._num_unanswered += 1

    def _receive(self, timeout_s: float) -> None:
        answers = self._transport.receive(timeout_s)
        self._num_unanswered -= 1
        for results, answer in zip(self._results, answers, strict=True):
            results.extend(wire.decode(FinishedSteps, answer).results)
