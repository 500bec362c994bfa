"""Continuous batching over token counts: prefill, chunks of it, and decode are one loop.

A request has tokens and planned positions; a step closes the gap within a token budget. `plan` and `commit`
alternate, or several plans are made before the first is committed: nothing here assumes a depth.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dist_vlm.sched.block_pool import BlockPool, BooksError
from dist_vlm.sched.draft import Draft, Entry, new_sequence
from dist_vlm.sched.features import FeatureTable, overlapping
from dist_vlm.sched.fitting import blocking_resource, check_fits
from dist_vlm.sched.prefix_cache import PrefixCache
from dist_vlm.sched.queue import RequestQueue
from dist_vlm.sched.request import FinishReason, Request, RequestState
from dist_vlm.workers.plan import (
    ImageSpan,
    PromptLogprobs,
    SampledTokens,
    Slice,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

# Waiting requests that a plan may pass over because another is computing their beginning.
_MAX_PASSED_OVER = 64


@dataclass(slots=True)
class SchedulerStats:
    """Counts since the start.

    num_image_cuts: slices that ended inside an image.
    num_queried_tokens, num_hit_tokens: tokens known when a request began to run, and those of them found cached.
    num_queried_images, num_hit_images: images that a request still needed when it began to run, and those of them that
        were encoded already, or being encoded for another.
    """

    num_steps: int = 0
    num_scheduled_tokens: int = 0
    num_preemptions: int = 0
    num_encoded_images: int = 0
    num_image_cuts: int = 0
    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    num_queried_images: int = 0
    num_hit_images: int = 0


class Update(NamedTuple):
    """What a commit or an abort changed for one request: new tokens, its end, or both.

    logprobs: one for each new token where the request asked for them. prompt_logprobs: those of further prompt tokens.
    """

    request: Request
    new_token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class Scheduler:
    """Owns the block table, the slots and the queues. By priority, and among equals first come, first served.

    max_num_seqs: slots.
    max_num_batched_tokens: token budget of a step; also the encoder's, in feature rows, but one image
        larger than that is still encoded, alone.
    features: the encoded images; without it, they are unlimited and none is kept beyond its requests.
    """

    def __init__(
        self,
        *,
        pool: BlockPool,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        features: FeatureTable | None = None,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.pool = pool
        self.max_num_batched_tokens = max_num_batched_tokens
        self.stats = SchedulerStats()
        self.features = features or FeatureTable()
        self.prefix_cache = PrefixCache(pool, enabled=enable_prefix_caching)
        self._requests: dict[str, Request] = {}
        self._waiting = RequestQueue()
        self._running = RequestQueue()
        self._leaving: list[Request] = []  # ended, but named by a plan in flight
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._to_release: list[int] = []
        self._in_flight: deque[tuple[int, list[Entry]]] = deque()
        self._next_step_id = 0
        self._num_arrived = 0

    def count_on(self, before: Scheduler) -> None:
        """Its counts go on from those of another, which is not used any more."""
        self.stats, self.prefix_cache.stats = before.stats, before.prefix_cache.stats

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_in_flight(self) -> int:
        """Plans made and not yet committed."""
        return len(self._in_flight)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._in_flight)

    def add(self, request: Request) -> None:
        """Queues a new request. Raises `ValueError` for one that could never run."""
        self.check_fits(request)
        request.state = RequestState.WAITING
        request.arrival = self._num_arrived
        self._num_arrived += 1
        self._requests[request.request_id] = request
        self._waiting.add(request)

    def check_fits(self, request: Request) -> None:
        """Raises `ValueError` for a request that could never run."""
        if request.request_id in self._requests:
            raise ValueError(f"request_id {request.request_id!r} is in use")
        check_fits(request, self.pool, self.features)

    def look_ahead(self, request: Request) -> None:
        """For a request that will be added later: does now what of its plan depends on it alone."""
        self.prefix_cache.look_ahead(request)

    # ------------------------------------------------------------------ plan

    def plan(self) -> StepPlan | None:
        """The next step, or None if nothing can be done before a commit or a new request."""
        draft = Draft(self.max_num_batched_tokens, self.max_num_batched_tokens)
        outranked = self._yield_to_priority()
        num_preemptions = self.stats.num_preemptions
        blocked = self._plan_running(draft, outranked)
        if not blocked and self.stats.num_preemptions == num_preemptions:
            self._plan_waiting(draft)
        if not draft.entries:
            return None
        return self._seal(draft)

    def _yield_to_priority(self) -> Request | None:
        """Preempts running requests for a waiting one of higher priority that has no slot or no blocks.

        One that plans in flight name cannot go yet: it is returned, to be left out of this plan.
        """
        while self._waiting and self._running:
            head, victim = self._waiting.first, self._running.last
            if head.priority >= victim.priority or (self._free_slots and self._has_blocks(head)):
                return None
            if victim.num_in_flight:
                return victim
            self._preempt(victim)
        return None

    def _plan_running(self, draft: Draft, outranked: Request | None) -> bool:
        """Continues running requests in their order; true if one must wait for a commit to get blocks.

        Each request behind keeps a token of the budget, so that a long prompt does not stop the answers beside it.
        """
        unfinished = [(request, missing) for request in self._running if (missing := request.num_missing)]
        behind = len(unfinished)
        for request, missing in unfinished:
            if draft.token_budget == 0:
                break
            if request.state is not RequestState.RUNNING or request is outranked:
                continue  # preempted by an older one in this very loop, or to be preempted soon
            behind -= 1
            count = self._affordable(request, draft, min(missing, max(1, draft.token_budget - behind)))
            if count == 0:
                continue
            if not self._make_room(request, request.num_planned + count):
                if request.state is RequestState.RUNNING:
                    return True
                continue
            self._append_slice(request, count, draft)
        return False

    def _plan_waiting(self, draft: Draft) -> None:
        passed_over = 0
        for request in self._waiting:
            if not self._free_slots or draft.token_budget == 0 or passed_over > _MAX_PASSED_OVER:
                return
            cached = self.prefix_cache.find(request)
            if self.prefix_cache.is_worth_waiting(request, len(cached)):
                passed_over += 1
                continue
            if not self._has_blocks(request, cached):
                return
            request.num_planned = len(cached) * self.pool.block_size
            count = self._affordable(request, draft, min(request.num_missing, draft.token_budget))
            if count == 0:
                request.num_planned = 0
                return
            self._start(request, cached)
            draft.new.append(new_sequence(request))
            self._append_slice(request, count, draft, cached)

    def _has_blocks(self, request: Request, cached: Sequence[int] | None = None) -> bool:
        """Whether blocks for all of its known tokens are there, so that a long prompt is not begun to be preempted."""
        found = self.prefix_cache.find(request) if cached is None else cached
        needed = self.pool.blocks_for(request.num_tokens) - len(found)
        return needed <= self.pool.num_allocatable - self.pool.num_revived(found)

    def _start(self, request: Request, cached: Sequence[int]) -> None:
        self._waiting.remove(request)
        self._running.add(request)
        request.state = RequestState.RUNNING
        request.slot = self._free_slots.pop()
        if request.first_scheduled_time is None:
            request.first_scheduled_time = time.time()
            request.num_cached_tokens = request.num_planned
        images = _images_ahead(request)
        self.stats.num_queried_images += len(images)
        self.stats.num_hit_images += sum(map(self.features.is_resident, images))
        self.pool.share(cached)
        request.block_ids.extend(cached)
        self.prefix_cache.begin(request, len(cached))

    def _affordable(self, request: Request, draft: Draft, count: int) -> int:
        """How many of the request's next `count` positions the budget of images allows: cut before one too many."""
        start = request.num_planned
        if start >= request.images_end:
            return count
        spans = overlapping(request.images, start, start + count)
        for number, span in enumerate(spans, start=1):
            if not self.features.fits(spans[:number]) or not self._can_encode(spans[:number], draft):
                return max(0, span.start - start)
        return count

    def _can_encode(self, spans: Sequence[ImageSpan], draft: Draft) -> bool:
        rows = {span.image: span.count for span in spans if not self.features.is_resident(span.image)}
        return sum(rows.values()) <= draft.encode_budget or (len(rows) == 1 and not draft.encode) or not rows

    def _make_room(self, request: Request, num_positions: int) -> bool:
        """Frees blocks for the request by preempting the last in line; false if it must wait or was itself the last."""
        needed = self.pool.blocks_for(num_positions) - len(request.block_ids)
        while needed > 0 and self.pool.num_allocatable < needed:
            victim = self._running.last
            if victim.num_in_flight:
                return False
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _append_slice(self, request: Request, count: int, draft: Draft, cached: Sequence[int] = ()) -> None:
        start, end = request.num_planned, request.num_planned + count
        num_lacking = self.pool.blocks_for(end) - len(request.block_ids)
        added = self.pool.allocate(num_lacking) if num_lacking > 0 else ()
        request.block_ids.extend(added)
        if start < request.images_end:
            self._need_images(request, end, draft)
        sample = end == request.num_tokens
        assert request.slot is not None
        draft.take(request, Slice(request.slot, start, count, (*cached, *added), sample))
        request.num_planned = end
        request.num_in_flight += 1
        request.num_pending += sample

    def _need_images(self, request: Request, end: int, draft: Draft) -> None:
        spans = overlapping(request.images, request.num_planned, end)
        for span in self.features.need(spans, request.request_id):
            draft.encode.append(span.image)
            draft.encode_budget -= span.count
        self.stats.num_image_cuts += sum(span.end > end for span in spans)

    def _seal(self, draft: Draft) -> StepPlan:
        # Decided before this plan's own needs end, so nothing it uses is dropped by it.
        drop = self.features.take_droppable()
        plan = StepPlan(
            step_id=self._next_step_id,
            new=tuple(draft.new),
            slices=tuple([entry.piece for entry in draft.entries]),
            release=tuple(self._to_release),
            encode=tuple(draft.encode),
            drop_features=drop,
        )
        self._to_release.clear()
        self._in_flight.append((plan.step_id, draft.entries))
        self._next_step_id += 1
        for request, piece in draft.entries:
            if piece.start < request.images_end:
                self._end_needs(request)
        self.stats.num_steps += 1
        self.stats.num_scheduled_tokens += self.max_num_batched_tokens - draft.token_budget
        self.stats.num_encoded_images += len(plan.encode)
        return plan

    def _end_needs(self, request: Request) -> None:
        """Gives up the images that no position still to be computed lies in."""
        behind = {span.image for span in request.images} - _images_ahead(request)
        self.features.give_up(behind, request.request_id)

    def _preempt(self, request: Request) -> None:
        """Takes everything from a running request; it starts over, with the tokens it has, when there is room."""
        self._running.remove(request)
        self._free(request)
        request.state = RequestState.WAITING
        request.num_planned = 0
        request.num_preemptions += 1
        self.stats.num_preemptions += 1
        self._waiting.add(request)

    def _free(self, request: Request) -> None:
        self.prefix_cache.end(request)
        # The end of a sequence goes out of the cache before its beginning, which more sequences share.
        self.pool.release(reversed(request.block_ids))
        request.block_ids.clear()
        self.features.give_up((span.image for span in request.images), request.request_id)
        if request.slot is not None:
            self._to_release.append(request.slot)
            self._free_slots.append(request.slot)
            request.slot = None

    # ---------------------------------------------------------------- commit

    def commit(self, result: StepResult) -> list[Update]:
        """Takes the answer to the oldest plan in flight and returns what it changed."""
        step_id, entries = self._in_flight.popleft()
        if result.step_id != step_id:
            raise BooksError(f"result of step {result.step_id} while step {step_id} is the oldest in flight")
        sampled = {item.slot: item for item in result.sampled}
        prompt_logprobs = {item.slot: item for item in result.prompt_logprobs}
        slot_failures = {failure.slot: failure.reason for failure in result.slot_failures}
        updates = self._fail_images({failure.image: failure.reason for failure in result.image_failures}, entries)
        for request, piece in entries:
            request.num_in_flight -= 1
            request.num_pending -= piece.sample
            if request.is_finished:
                self._leave_if_idle(request)
            elif piece.slot in slot_failures:
                updates.append(self._end(request, "error", slot_failures[piece.slot]))
            else:
                update = self._accept(request, piece, sampled.get(piece.slot), prompt_logprobs.get(piece.slot))
                if update is not None:
                    updates.append(update)
        self.stats.num_queried_tokens = self.prefix_cache.stats.num_queried_tokens
        self.stats.num_hit_tokens = self.prefix_cache.stats.num_hit_tokens
        return updates

    def _fail_images(self, failures: dict[str, str], entries: list[Entry]) -> list[Update]:
        """Ends the requests that needed an image which failed, in this step or in plans already sent after it."""
        updates = []
        for image in failures:
            self.features.lose(image)
        if failures:
            later = [entry for _, sent in self._in_flight for entry in sent]
            for entry in (*entries, *later):
                reason = _image_failure(entry.request, entry.piece, failures)
                if reason is not None and not entry.request.is_finished:
                    updates.append(self._end(entry.request, "error", reason))
        return updates

    def _accept(
        self, request: Request, piece: Slice, sampled: SampledTokens | None, logprobs: PromptLogprobs | None
    ) -> Update | None:
        """Takes what a slice gave; None if that is nothing a client sees."""
        told: tuple[TokenLogprobs, ...] = ()
        if logprobs is not None:
            told = _untold(request, logprobs)
            request.num_prompt_logprobs += len(told)
        if piece.sample:
            if sampled is None:
                raise BooksError(f"{request.request_id}: no token and no failure came for slot {piece.slot}")
            self.prefix_cache.publish(request, piece.start + piece.count)
            return self._accept_tokens(request, sampled, told)
        return Update(request, prompt_logprobs=told) if told else None

    def _accept_tokens(self, request: Request, sampled: SampledTokens, told: tuple[TokenLogprobs, ...]) -> Update:
        """Appends sampled tokens up to the one that ends the request."""
        output, first = request.output_token_ids, len(request.output_token_ids)
        for token in sampled.token_ids:
            output.append(token)
            if token in request.stop_token_ids:
                self._end(request, "stop", token)
                break
            if len(output) >= request.max_tokens:
                self._end(request, "length")
                break
        count = len(output) - first
        return Update(request, sampled.token_ids[:count], sampled.logprobs[:count], told)

    # ------------------------------------------------------------------- end

    def abort(self, request_id: str) -> Update | None:
        """Ends a request at any moment; None if it is not here (any more)."""
        request = self._requests.get(request_id)
        if request is None or request.is_finished:
            return None
        return self._end(request, "abort")

    def stop(self, request_id: str, stop_reason: int | str) -> Update | None:
        """Ends a request whose text has met a stop condition that tokens alone do not show."""
        request = self._requests.get(request_id)
        if request is None or request.is_finished:
            return None
        return self._end(request, "stop", stop_reason)

    def fail(self, request_id: str, reason: str) -> Update | None:
        """Ends a request for a cause found outside the ranks."""
        request = self._requests.get(request_id)
        if request is None or request.is_finished:
            return None
        return self._end(request, "error", reason)

    def unblock(self) -> list[Update]:
        """To be called when work waits, nothing is in flight and nothing could be planned: ends exactly the requests
        that can never run, each with the resource it lacks. Raises `BooksError` if there is none of that kind."""
        stuck = [*self._running, *self._waiting]
        reasons = [(request, blocking_resource(request, self.pool, self.features)) for request in stuck]
        updates = [self._end(request, "error", reason) for request, reason in reasons if reason is not None]
        if not updates:
            raise BooksError(
                f"{len(self._waiting)} requests wait, {len(self._running)} run and none can be planned with "
                f"{len(self._free_slots)} free slots, {self.pool.num_allocatable} blocks to be had of "
                f"{self.pool.num_blocks}, {self.features.num_rows} feature rows held of {self.features.capacity_rows}"
            )
        return updates

    def _end(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> Update:
        if request.state is RequestState.WAITING:
            self._waiting.remove(request)
        else:
            self._running.remove(request)
            self._leaving.append(request)
        request.finish(reason, stop_reason)
        self._leave_if_idle(request)
        return Update(request)

    def _leave_if_idle(self, request: Request) -> None:
        """Frees an ended request's blocks once no plan in flight names them."""
        if request.num_in_flight:
            return
        if request in self._leaving:
            self._leaving.remove(request)
        self._free(request)
        del self._requests[request.request_id]

    # ----------------------------------------------------------------- books

    def check(self) -> None:
        """Proves the books; raises `BooksError`. Cheap enough to run whenever the engine is idle."""
        holders = [*self._running, *self._leaving]
        self.pool.check(request.block_ids for request in holders)
        for request in self._running:
            if len(request.block_ids) != self.pool.blocks_for(request.num_planned):
                raise BooksError(
                    f"{request.request_id}: {len(request.block_ids)} blocks for {request.num_planned} tokens"
                )
        slots = [request.slot for request in holders] + list(self._free_slots)
        if None in slots or len(set(slots)) != len(slots):
            raise BooksError(f"slots are not held once each: {slots}")
        known = {id(request) for request in (*self._waiting, *holders)}
        if known != {id(request) for request in self._requests.values()}:
            raise BooksError("a request is in no queue, or in a queue and forgotten")
        self.check_sums()

    def check_sums(self) -> None:
        """The part of `check` that takes no time: `BooksError` where nothing is left to do and a block is held."""
        if not self.has_work and (self.pool.num_held or self._leaving):
            raise BooksError(f"idle with {self.pool.num_held} blocks held")


def _images_ahead(request: Request) -> set[str]:
    """The images that a position still to be computed lies in."""
    return {span.image for span in request.images if span.end > request.num_planned}


def _untold(request: Request, logprobs: PromptLogprobs) -> tuple[TokenLogprobs, ...]:
    """The prompt's log probabilities that are news: a preempted request computes the earlier ones again."""
    return logprobs.entries[1 + request.num_prompt_logprobs - logprobs.start :]


def _image_failure(request: Request, piece: Slice, failures: dict[str, str]) -> str | None:
    """The cause if a slice needed an image that failed."""
    for span in overlapping(request.images, piece.start, piece.start + piece.count):
        if span.image in failures:
            return failures[span.image]
    return None
