"""Drives a scheduler against a checked ledger, as the engine core does, with any number of plans in flight."""

from __future__ import annotations

from collections import deque

from dist_vlm.executor.contract import Ledger, Limits, Script
from dist_vlm.executor.fake import checksum_token
from dist_vlm.sched.block_pool import BlockPool
from dist_vlm.sched.features import FeatureTable
from dist_vlm.sched.request import Request
from dist_vlm.sched.scheduler import Scheduler, Update
from dist_vlm.workers.plan import ImageSpan, StepPlan


class Rig:
    """A scheduler, a ledger that raises on a plan no rank could run, and the plans between them."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 4,
        budget: int = 16,
        depth: int = 1,
        fail_images: frozenset[str] = frozenset(),
        fail_slots: frozenset[tuple[int, int]] = frozenset(),
        prefix_caching: bool = False,
        feature_rows: int | None = None,
        keep_features: bool = False,
    ) -> None:
        limits = Limits(num_blocks, block_size, max_num_seqs, budget)
        script = Script(
            checksum_token,
            lambda key: "bad" if key in fail_images else None,
            lambda step, slot: "bad slot" if (step, slot) in fail_slots else None,
        )
        self.ledger = Ledger(limits, script)
        self.scheduler = Scheduler(
            pool=BlockPool(num_blocks, block_size),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            features=FeatureTable(feature_rows, keep=keep_features),
            enable_prefix_caching=prefix_caching,
        )
        self.depth = depth
        self.results = deque()
        self.plans: list[StepPlan] = []
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, list[str]] = {}

    def add(self, request: Request) -> None:
        for span in request.images:
            self.ledger.staged[span.image] = span.count
        self.scheduler.add(request)
        self.tokens[request.request_id] = []
        self.ends[request.request_id] = []

    def step(self) -> None:
        """One turn of the loop, then proof of the books."""
        while self.scheduler.num_in_flight < self.depth:
            plan = self.scheduler.plan()
            if plan is None:
                break
            self.plans.append(plan)
            self.results.append(self.ledger.apply(plan))
        if self.results:
            result = self.results.popleft()
            self.ledger.collected = result.step_id
            for update in self.scheduler.commit(result):
                self.note(update)
        self.scheduler.check()

    def note(self, update: Update | None) -> None:
        if update is None:
            return
        request = update.request
        self.tokens[request.request_id].extend(update.new_token_ids)
        if request.is_finished:
            self.ends[request.request_id].append(str(request.finish_reason))

    def run(self, max_steps: int = 5000) -> None:
        """Steps until nothing is left to do."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"work is left after {max_steps} steps")


def expected_tokens(prompt: tuple[int, ...], max_tokens: int, stop: frozenset[int] = frozenset()) -> list[int]:
    """What the ledger's script answers to a prompt by itself."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(checksum_token(tokens, len(tokens)))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


def prompt_with_images(seed: int, length: int, images: tuple[ImageSpan, ...]) -> tuple[int, ...]:
    covered = {position for span in images for position in range(span.start, span.end)}
    return tuple(-1 % 5000 if p in covered else (seed * 7919 + p * 31) % 1000 for p in range(length))
