"""The plan being made."""

from __future__ import annotations

from typing import NamedTuple

from dist_vlm.sched.request import Request
from dist_vlm.workers.plan import NewSequence, Slice


class Entry(NamedTuple):
    """A slice of a plan, and whose it is."""

    request: Request
    piece: Slice


class Draft:
    """What is left of a step's budgets, in tokens and in feature rows to encode, and the plan's parts so far."""

    def __init__(self, token_budget: int, encode_budget: int) -> None:
        self.token_budget = token_budget
        self.encode_budget = encode_budget
        self.new: list[NewSequence] = []
        self.entries: list[Entry] = []
        self.encode: list[str] = []

    def take(self, request: Request, piece: Slice) -> None:
        self.token_budget -= piece.count
        self.entries.append(Entry(request, piece))


def new_sequence(request: Request) -> NewSequence:
    """A request that holds a slot, as the ranks are told of it."""
    assert request.slot is not None
    return NewSequence(
        slot=request.slot,
        token_ids=(*request.prompt_token_ids, *request.output_token_ids),
        num_prompt_tokens=len(request.prompt_token_ids),
        images=request.images,
        sampling=request.sampling,
    )
