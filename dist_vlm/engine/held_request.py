"""A request that has not ended, and what it has to do with losses of ranks."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from dist_vlm.engine.messages import EngineRequest
from dist_vlm.sched.request import Request


@dataclass(slots=True, eq=False)
class HeldRequest:
    """record: the scheduler's. request: as it came, images included; None where it is never given to the ranks again.

    num_losses: how often ranks were lost while it was computed, or on its way to them, since its last token.
    num_tokens: of its answer, when ranks were lost last.
    has_ended: whether nothing more is told of it.
    """

    record: Request
    request: EngineRequest | None
    num_losses: int = 0
    num_tokens: int = 0
    has_ended: bool = False

    @property
    def has_news(self) -> bool:
        """Whether it has got a token since ranks were lost last."""
        return len(self.record.output_token_ids) > self.num_tokens

    def lose(self, *, is_concerned: bool) -> None:
        """Ranks are lost. is_concerned: whether it may be why."""
        if self.has_news:
            self.num_losses = 0
        self.num_losses += is_concerned
        self.num_tokens = len(self.record.output_token_ids)


class ReturnLine:
    """Requests that wait to be given to new ranks.

    Suspects come first, of which one may be why ranks were lost: one at a time, each when the one before it has got a
    token or has ended, so that with whichever ranks are lost again, it is known. The others follow together, for they
    would take the places of those that had them.
    """

    def __init__(self) -> None:
        self._suspects: deque[HeldRequest] = deque()
        self._others: deque[HeldRequest] = deque()
        self._on_trial: HeldRequest | None = None

    def __len__(self) -> int:
        """Those that wait."""
        return len(self._suspects) + len(self._others)

    def clear(self) -> None:
        self._suspects.clear()
        self._others.clear()
        self._on_trial = None

    def append(self, held: HeldRequest) -> None:
        (self._suspects if held.num_losses else self._others).append(held)

    def withdraw(self, held: HeldRequest) -> bool:
        """Takes one out that waits; false if it does not."""
        for queue in (self._suspects, self._others):
            if held in queue:
                queue.remove(held)
                return True
        return False

    def take(self) -> list[HeldRequest]:
        """Those whose turn it is."""
        if self._on_trial is not None and not (self._on_trial.has_ended or self._on_trial.has_news):
            return []
        if self._suspects:
            self._on_trial = self._suspects.popleft()
            return [self._on_trial]
        self._on_trial = None
        others = list(self._others)
        self._others.clear()
        return others
