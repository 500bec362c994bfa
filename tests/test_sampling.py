import dataclasses

import pytest

from dist_vlm.sampling import SamplingParams, refuse_unserved

DEFAULTS = {
    "n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "temperature": 1.0,
    "top_p": 1.0, "top_k": -1, "min_p": 0.0, "seed": None, "use_beam_search": False, "length_penalty": 1.0,
    "early_stopping": False, "include_stop_str_in_output": False, "ignore_eos": False, "max_tokens": 16,
    "min_tokens": 0, "logprobs": None, "prompt_logprobs": None, "detokenize": True, "skip_special_tokens": True,
    "spaces_between_special_tokens": True, "logits_processors": None, "truncate_prompt_tokens": None,
}  # fmt: skip


def test_names_order_and_defaults_are_the_seeds():
    params = SamplingParams()
    assert {name: getattr(params, name) for name in DEFAULTS} == DEFAULTS
    assert (params.best_of, params.stop, params.stop_token_ids) == (1, [], [])
    assert [item.name for item in dataclasses.fields(SamplingParams)][:6] == [
        "n", "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, r"n = 0: must be an integer, at least 1"),
        ({"n": True}, r"n = True"),
        ({"n": 2, "best_of": 1}, r"best_of = 1: must be at least n = 2"),
        ({"presence_penalty": 2.1}, r"presence_penalty = 2.1: must be in \[-2, 2\]"),
        ({"frequency_penalty": -3}, r"frequency_penalty = -3"),
        ({"repetition_penalty": 0}, r"repetition_penalty = 0: must be in \(0, 2\]"),
        ({"temperature": -0.1}, r"temperature = -0.1"),
        ({"temperature": float("nan")}, r"temperature = nan"),
        ({"temperature": "hot"}, r"temperature = 'hot'"),
        ({"top_p": 0}, r"top_p = 0: must be in \(0, 1\]"),
        ({"top_p": 1.01}, r"top_p = 1.01"),
        ({"top_k": 0}, r"top_k = 0: must be -1 \(all\) or at least 1"),
        ({"top_k": -2}, r"top_k = -2"),
        ({"min_p": 1.5}, r"min_p = 1.5"),
        ({"seed": 2**63}, r"seed = 9223372036854775808"),
        ({"max_tokens": 0}, r"max_tokens = 0"),
        ({"min_tokens": 5, "max_tokens": 4}, r"min_tokens = 5: must be at most max_tokens = 4"),
        ({"stop": [""]}, r"stop = \[''\]"),
        ({"stop": "x", "detokenize": False}, r"needs detokenize=True"),
        ({"stop_token_ids": [-1]}, r"stop_token_ids = -1"),
        ({"logprobs": -1}, r"logprobs = -1"),
        ({"temperature": 0, "best_of": 2}, r"best_of = 2: must be 1 when sampling greedily"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)


def test_a_temperature_near_zero_is_greedy_and_makes_the_cuts_moot():
    params = SamplingParams(temperature=1e-6, top_p=0.5, top_k=3, min_p=0.1)
    assert params.is_greedy
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.0, 1.0, -1, 0.0)
    assert not SamplingParams(temperature=1e-4).is_greedy


def test_seed_minus_one_means_none():
    assert SamplingParams(seed=-1).seed is None


@pytest.mark.parametrize(
    "values",
    [
        {"n": 2}, {"best_of": 2}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.5}, {"repetition_penalty": 1.2},
        {"min_p": 0.1}, {"use_beam_search": True}, {"length_penalty": 2.0}, {"early_stopping": True}, {"stop": "x"},
        {"include_stop_str_in_output": True}, {"min_tokens": 1}, {"logprobs": 1}, {"prompt_logprobs": 0},
        {"spaces_between_special_tokens": False}, {"logits_processors": [len]}, {"truncate_prompt_tokens": 3},
    ],
)  # fmt: skip
def test_a_field_that_is_not_served_is_refused_by_name(values):
    (name,) = values
    with pytest.raises(ValueError, match=rf"{name if name != 'n' else 'n'} = .*not served"):
        refuse_unserved(SamplingParams(**values))


def test_every_field_is_either_served_or_refused():
    served = {
        "temperature", "top_p", "top_k", "seed", "stop_token_ids", "ignore_eos", "max_tokens", "detokenize",
        "skip_special_tokens",
    }  # fmt: skip
    from dist_vlm.sampling import _NOT_SERVED

    assert served | {name for name, _ in _NOT_SERVED} == {item.name for item in dataclasses.fields(SamplingParams)}
    refuse_unserved(SamplingParams(temperature=0.5, top_p=0.9, top_k=5, seed=1, ignore_eos=True, max_tokens=None))


def test_clone_is_independent():
    params = SamplingParams(stop_token_ids=[1])
    params.clone().stop_token_ids.append(2)
    assert params.stop_token_ids == [1]
