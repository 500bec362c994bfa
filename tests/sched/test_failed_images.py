"""Images that fail on ranks which learn of it when the step has ended, as those of a GPU do."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dist_vlm.executor.contract import Ledger, Script
from dist_vlm.executor.fake import checksum_token
from dist_vlm.sched.request import Request
from dist_vlm.workers.plan import ImageFailure, ImageSpan, Slice, StepPlan

from .driving import Rig, expected_tokens, prompt_with_images

ROWS = 4
IMAGES = ("good 1", "good 2", "good 3", "bad")


class HoldingLedger(Ledger):
    """Holds something in the place of a failed image's features until it is dropped, and computes slices over it. No
    block that they wrote may be given to another sequence for its content."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._spoilt_images: set[str] = set()
        self._spoilt_slots: dict[int, Any] = {}

    def _drop(self, keys: tuple[str, ...]) -> None:
        for key in keys:
            self._require(key in self.features, f"features of image {key!r} are dropped and not held")
            del self.features[key]

    def _encode(self, plan: StepPlan) -> list[ImageFailure]:
        failures = super()._encode(plan)
        self._spoilt_images.difference_update(plan.encode)
        for failure in failures:
            self.features[failure.image] = self.staged[failure.image]
            self._spoilt_images.add(failure.image)
        return failures

    def _write(self, piece: Slice, state: Any, where: str) -> None:
        super()._write(piece, state, where)
        end = piece.start + piece.count
        if any(
            span.image in self._spoilt_images and span.start < end and span.end > piece.start for span in state.images
        ):
            self._spoilt_slots[id(state)] = state
        if id(state) in self._spoilt_slots:
            for position in range(piece.start, end):
                self._content[state.table[position // self.limits.block_size], position % self.limits.block_size] = -1


def random_request(name: str, draw: random.Random) -> Request:
    """Up to two images, maybe the same."""
    spans: list[ImageSpan] = []
    end = draw.randint(0, 3)
    for _ in range(draw.choice([0, 1, 1, 2])):
        spans.append(ImageSpan(draw.choice(IMAGES), end, ROWS))
        end += ROWS + draw.randint(0, 2)
    prompt = prompt_with_images(draw.randint(0, 2), end + draw.randint(1, 6), tuple(spans))
    priority = draw.choice([0, 0, 1])
    return Request(name, prompt, max_tokens=draw.randint(1, 6), images=tuple(spans), priority=priority)


@pytest.mark.parametrize("first_seed", range(0, 200, 50))
def test_only_requests_with_a_failed_image_end_for_it_and_nothing_stays_behind(first_seed: int) -> None:
    """Shared images, aborts, preemption, cached prefixes and kept features, with one to four plans in flight."""
    ends: set[str] = set()
    for seed in range(first_seed, first_seed + 50):
        draw = random.Random(seed)
        rig = Rig(
            num_blocks=draw.choice([12, 20, 64]),
            budget=draw.choice([5, 8, 16]),
            depth=draw.choice([1, 2, 3, 4]),
            max_num_seqs=draw.choice([2, 4]),
            prefix_caching=draw.random() < 0.6,
            feature_rows=draw.choice([None, 8, 12, 16]),
            keep_features=draw.random() < 0.6,
        )
        sometimes = draw.choice([0.0, 0.0, 0.2])

        def failure(image: str, draw: random.Random = draw, sometimes: float = sometimes) -> str | None:
            return "bad" if image == "bad" or draw.random() < sometimes else None

        rig.ledger = HoldingLedger(rig.ledger.limits, Script(checksum_token, failure, lambda step, slot: None))
        requests: list[Request] = []
        for _ in range(120):
            if len(requests) < 14 and draw.random() < 0.3:
                requests.append(random_request(f"r{len(requests)}", draw))
                rig.add(requests[-1])
            if requests and draw.random() < 0.05:
                rig.note(rig.scheduler.abort(draw.choice(requests).request_id))
            if rig.scheduler.has_work:
                rig.step()
        rig.run()
        for request in requests:
            (end,) = rig.ends[request.request_id]
            ends.add(end)
            has_bad = any(span.image == "bad" for span in request.images)
            if end == "length":
                assert not has_bad
                expected = expected_tokens(request.prompt_token_ids, request.max_tokens)
                assert rig.tokens[request.request_id] == expected, (seed, request.request_id)
            elif end == "error" and not sometimes:
                assert has_bad, (seed, request.request_id)
        held, dropped = set(rig.ledger.features), set(rig.scheduler.features.take_droppable())
        assert dropped <= held, seed
        assert len(held - dropped) == rig.scheduler.features.num_resident, seed
    assert ends == {"length", "error", "abort"}
