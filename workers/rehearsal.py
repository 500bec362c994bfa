"""A step that a rank of a GPU computes for nobody at its start.

Whatever is asked of a device for the first time takes longer: code is loaded, libraries choose how to multiply,
memory is allocated, small batches of images are recorded. Without a rehearsal the first requests would wait for it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from dist_vlm.workers.config import RankConfig
from dist_vlm.workers.models.spec import ModelSpec
from dist_vlm.workers.plan import ImageSpan, NewSequence, SamplingRow, Slice, StepPlan

if TYPE_CHECKING:
    from dist_vlm.workers.runner import Runner

# Of each sequence with an image, and of those that follow without one.
_TEXT_TOKENS = 32
# Steps that serve count up from 0.
_STEP_ID = -1
# What a request may ask of a token's choice, by kernels of its own.
_DRAWN = SamplingRow(temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.1, presence_penalty=0.1)

_log = logging.getLogger(__name__)


def rehearse(runner: Runner) -> None:
    """Computes a step of as many tokens and images as one may have, and forgets it. All ranks must, at once.

    What the step writes to the KV cache lies in its first block, which belongs to no sequence yet. Raises what a step
    raises; an image or a sequence that failed is told in the log.
    """
    plan, after = rehearsal_plans(runner.spec, runner.config)
    for key in plan.encode:
        assert runner.spec.image_input_shape is not None
        runner.stage(key, "pixel_values", np.zeros(runner.spec.image_input_shape, dtype=np.float32))
    result = runner.launch(plan).result()
    runner.launch(after).result()
    for key in plan.encode:
        runner.unstage(key)
    if failures := (*result.image_failures, *result.slot_failures):
        _log.warning("the rehearsal of a step failed: %s", failures)


def rehearsal_plans(spec: ModelSpec, config: RankConfig) -> tuple[StepPlan, StepPlan]:
    """The step, and one that forgets all it has left behind."""
    new: list[NewSequence] = []
    encode: list[str] = []
    left = config.max_num_batched_tokens
    for slot in range(config.max_num_seqs):
        most = min(left, config.max_model_len)
        count, images = _next_sequence(spec, most, key=f"rehearsed {slot}")
        if not count:
            break
        if slot == config.max_num_seqs - 1:
            count = most
        sampling = _DRAWN if slot == 0 else SamplingRow()
        new.append(NewSequence(slot, (0,) * count, count, images, sampling))
        encode += [image.image for image in images]
        left -= count
    slices = tuple(
        Slice(one.slot, 0, len(one.token_ids), (0,) * -(-len(one.token_ids) // config.block_size), True) for one in new
    )
    slots, keys = tuple(one.slot for one in new), tuple(encode)
    step = StepPlan(_STEP_ID, new=tuple(new), slices=slices, encode=keys)
    return step, StepPlan(_STEP_ID, release=slots, drop_features=keys)


def _next_sequence(spec: ModelSpec, most: int, *, key: str) -> tuple[int, tuple[ImageSpan, ...]]:
    """The tokens of a sequence of at most `most`, and its images: one and some text, or where none fits text alone."""
    rows = spec.image_feature_size
    if rows is None or spec.image_input_shape is None:
        return most, ()
    if rows > most:
        return min(most, _TEXT_TOKENS), ()
    return min(most, rows + _TEXT_TOKENS), (ImageSpan(key, 0, rows),)
