import itertools

import pytest

from dist_vlm.engine.jobs import Job, is_batch, jobs_of, one_source
from dist_vlm.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0)
FREE = SamplingParams(temperature=1)


def test_one_prompt_and_several():
    assert list(jobs_of("a", GREEDY, 0)) == [Job("a", GREEDY, 0)]
    assert list(jobs_of({"prompt": "a"}, None, 3)) == [Job({"prompt": "a"}, SamplingParams(), 3)]
    assert list(jobs_of(["a", "b"], GREEDY, 0)) == [Job("a", GREEDY, 0), Job("b", GREEDY, 0)]
    assert list(jobs_of(["a", "b"], [GREEDY, FREE], [1, 2])) == [Job("a", GREEDY, 1), Job("b", FREE, 2)]
    assert list(jobs_of([], GREEDY, 0)) == []


def test_what_is_a_batch():
    assert [is_batch(one) for one in ("a", {"prompt": "a"}, 5, None)] == [False] * 4
    assert [is_batch(one) for one in (["a"], ("a",), iter("ab"), (x for x in "ab"))] == [True] * 4


def test_nothing_is_drawn_before_it_is_asked_for():
    drawn = []

    def prompts():
        for number in itertools.count():
            drawn.append(number)
            yield f"prompt {number}"

    jobs = jobs_of(prompts(), itertools.cycle([GREEDY, FREE]), itertools.count(10))
    assert drawn == []
    assert [next(jobs) for _ in range(3)] == [
        Job("prompt 0", GREEDY, 10), Job("prompt 1", FREE, 11), Job("prompt 2", GREEDY, 12),
    ]  # fmt: skip
    assert drawn == [0, 1, 2]


def test_numbers_that_do_not_fit_are_named_at_once_where_they_are_known():
    with pytest.raises(ValueError, match="sampling_params has 2 entries for 1 prompts: must be one, or one each"):
        jobs_of(["a"], [GREEDY, GREEDY], 0)
    with pytest.raises(ValueError, match="priority has 1 entries for 2 prompts"):
        jobs_of(["a", "b"], GREEDY, [1])
    with pytest.raises(ValueError, match="sampling_params has 2 entries for 1 prompts"):
        jobs_of("a", [GREEDY, GREEDY], 0)
    with pytest.raises(ValueError, match="sampling_params of type int: must be a SamplingParams or a list"):
        jobs_of("a", 5, 0)


def test_numbers_that_do_not_fit_are_named_when_it_turns_out():
    jobs = jobs_of(iter("abc"), [GREEDY, GREEDY], 0)
    assert [next(jobs).inputs, next(jobs).inputs] == ["a", "b"]
    with pytest.raises(ValueError, match="sampling_params has 2 entries and there are more prompts"):
        next(jobs)
    with pytest.raises(ValueError, match="priority has 3 entries for 2 prompts"):
        list(jobs_of(iter("ab"), GREEDY, [1, 2, 3]))


def test_one_source():
    assert one_source("a", None, None) == "a"
    assert one_source(None, {"prompt": "a"}, None) == {"prompt": "a"}
    assert one_source(None, None, [1, 2]) == {"prompt_token_ids": [1, 2]}
    assert one_source(None, None, [[1], [2]]) == [{"prompt_token_ids": [1]}, {"prompt_token_ids": [2]}]
    with pytest.raises(ValueError, match="0 of prompts, inputs and prompt_token_ids are given"):
        one_source(None, None, None)
    with pytest.raises(ValueError, match="2 of prompts"):
        one_source("a", "b", None)
