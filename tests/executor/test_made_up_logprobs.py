"""Log probabilities of ranks that compute nothing have the form of the real ones."""

from __future__ import annotations

import math

import pytest

from dist_vlm.executor import made_up_logprobs
from dist_vlm.executor.fake import FakeExecutor
from dist_vlm.workers.plan import NewSequence, SamplingRow, Slice, StepPlan, TokenLogprobs


def test_the_token_is_the_likeliest_and_the_others_follow() -> None:
    entry = made_up_logprobs.of_token(2, 4)
    assert entry.rank == 1 and entry.top_ids == (2, 0, 1, 3)
    assert [math.exp(value) for value in entry.top_logprobs] == pytest.approx([0.5, 0.25, 0.125, 0.0625])
    assert entry.logprob == entry.top_logprobs[0]
    assert made_up_logprobs.of_token(2, 0) == TokenLogprobs(entry.logprob, 1)


def test_a_fake_rank_tells_them_where_they_are_asked_for() -> None:
    """Of a prompt in two chunks: each token once, but for the first; then one for the token that was sampled."""
    executor = FakeExecutor(num_blocks=8, block_size=4)
    executor.start()
    asking = SamplingRow(logprobs=1, prompt_logprobs=2)
    sequences = (NewSequence(0, (5, 6, 7), 3, (), asking), NewSequence(1, (5, 6, 7), 3, (), SamplingRow()))
    slices = (Slice(0, 0, 2, (0,), False), Slice(1, 0, 3, (1,), True))
    executor.submit(StepPlan(0, new=sequences, slices=slices))
    executor.submit(StepPlan(1, slices=(Slice(0, 2, 1, (), True),)))
    first, second = executor.collect(), executor.collect()
    (chunk,), (rest,) = first.prompt_logprobs, second.prompt_logprobs
    assert (chunk.slot, chunk.start) == (0, 1) and [entry.top_ids for entry in chunk.entries] == [(6, 0), (7, 0)]
    assert rest.entries == ()
    (silent,), (telling,) = first.sampled, second.sampled
    assert silent.slot == 1 and silent.logprobs == ()
    assert [entry.top_ids for entry in telling.logprobs] == [telling.token_ids]
