import dataclasses

import pytest

from dist_vlm.sampling import SamplingParams, refuse_unserved

DEFAULTS = {
    "n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "temperature": 1.0,
    "top_p": 1.0, "top_k": -1, "min_p": 0.0, "seed": None, "use_beam_search": False, "length_penalty": 1.0,
    "early_stopping": False, "include_stop_str_in_output": False, "ignore_eos": False, "max_tokens": 16,
    "min_tokens": 0, "logprobs": None, "prompt_logprobs": None, "detokenize": True, "skip_special_tokens": True,
    "spaces_between_special_tokens": True, "logits_processors": None, "truncate_prompt_tokens": None,
    "logit_bias": None, "bad_words": None,
}  # fmt: skip


def test_names_order_and_defaults_are_the_seeds():
    params = SamplingParams()
    assert {name: getattr(params, name) for name in DEFAULTS} == DEFAULTS
    assert (params.best_of, params.stop, params.stop_token_ids) == (1, [], [])
    names = [item.name for item in dataclasses.fields(SamplingParams)]
    assert names[:6] == [
        "n", "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature",
    ]  # fmt: skip
    assert names[-3:] == ["truncate_prompt_tokens", "logit_bias", "bad_words"], "newer ones come last"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, r"n = 0: must be an integer, at least 1"),
        ({"n": True}, r"n = True"),
        ({"n": 2, "best_of": 1}, r"best_of = 1: must be at least n = 2"),
        ({"presence_penalty": 2.1}, r"presence_penalty = 2.1: must be in \[-2, 2\]"),
        ({"frequency_penalty": -3}, r"frequency_penalty = -3"),
        ({"repetition_penalty": 0}, r"repetition_penalty = 0: must be in \[0.001, 2\]"),
        ({"repetition_penalty": 1e-4}, r"repetition_penalty = 0.0001"),
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
        ({"n": 65}, r"n = 65: must be an integer, at least 1 and at most 64"),
        ({"n": 2, "best_of": 65}, r"best_of = 65: must be an integer, at least 1 and at most 64"),
        ({"stop": ["x"] * 17}, r"stop has 17 entries: must have at most 16"),
        ({"stop": "x" * 1025}, r"stop holds a string of 1025 characters: must have at most 1024"),
        ({"stop": ["a\ud800"]}, r"stop holds '\\ud800', half of a surrogate pair"),
        ({"stop": 5}, r"stop of type int: must be a list"),
        ({"stop": {"a": 1}}, r"stop of type dict: must be a list"),
        ({"stop_token_ids": "12"}, r"stop_token_ids of type str: must be a list"),
        ({"stop_token_ids": list(range(257))}, r"stop_token_ids has 257 entries: must have at most 256"),
        ({"bad_words": ["a", ""]}, r"bad_words = \['a', ''\]: must hold strings that are not empty"),
        ({"bad_words": "a"}, r"bad_words of type str: must be a list"),
        ({"bad_words": ["a"] * 129}, r"bad_words has 129 entries: must have at most 128"),
        ({"bad_words": ["a" * 129]}, r"bad_words holds a string of 129 characters"),
        ({"logit_bias": [1]}, r"logit_bias = \[1\]: must be a mapping"),
        ({"logit_bias": {"5": 1.0}}, r"logit_bias: token id = '5': must be an integer, at least 0"),
        ({"logit_bias": {-5: 1.0}}, r"logit_bias: token id = -5"),
        ({"logit_bias": {5: 100.5}}, r"logit_bias\[5\] = 100.5: must be in \[-100, 100\]"),
        ({"logit_bias": {5: float("nan")}}, r"logit_bias\[5\] = nan"),
        ({"logit_bias": {5: float("-inf")}}, r"logit_bias\[5\] = -inf"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, r"logit_bias has 301 entries: must have at most 300"),
        ({"logits_processors": ["f"]}, r"logits_processors holds 'f': must hold functions"),
        ({"logits_processors": [len] * 17}, r"logits_processors has 17 entries: must have at most 16"),
        ({"ignore_eos": 1}, r"ignore_eos = 1: must be True or False"),
        ({"truncate_prompt_tokens": 0}, r"truncate_prompt_tokens = 0"),
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


@pytest.mark.parametrize(
    "name",
    ["presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p", "length_penalty"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, "1", None, True])
def test_no_number_field_takes_what_is_no_finite_number(name, value):
    with pytest.raises(ValueError, match=f"^{name} = "):
        SamplingParams(**{name: value})


def test_the_bounds_themselves_are_allowed():
    SamplingParams(
        n=64, best_of=64, presence_penalty=-2, frequency_penalty=2, repetition_penalty=0.001, top_p=1, min_p=1,
        stop=["x" * 1024] * 16, stop_token_ids=list(range(256)), bad_words=["x" * 128] * 128,
        logit_bias={token: -100 if token % 2 else 100 for token in range(300)}, logits_processors=[len] * 16,
    )  # fmt: skip


def test_nothing_asked_for_is_nothing():
    params = SamplingParams(stop=[], stop_token_ids=(), bad_words=[], logit_bias={}, logits_processors=[])
    assert (params.stop, params.stop_token_ids) == ([], [])
    assert (params.bad_words, params.logit_bias, params.logits_processors) == (None, None, None)
    assert SamplingParams(stop="END").stop == ["END"]


def test_seed_minus_one_means_none():
    assert SamplingParams(seed=-1).seed is None


@pytest.mark.parametrize("values", [{"use_beam_search": True}, {"length_penalty": 2.0}, {"early_stopping": True}])
def test_beam_search_is_refused_by_name_with_what_to_use(values):
    (name,) = values
    with pytest.raises(ValueError, match=rf"^{name} = .*not served.*use best_of"):
        refuse_unserved(SamplingParams(**values), serves_logits_processors=True)


def test_logits_processors_are_refused_by_name_where_the_ranks_are_elsewhere():
    params = SamplingParams(logits_processors=[lambda tokens, logits: logits])
    refuse_unserved(params, serves_logits_processors=True)
    with pytest.raises(ValueError, match="^logits_processors: served only with executor='inline'"):
        refuse_unserved(params, serves_logits_processors=False)


def test_every_other_field_is_served():
    refuse_unserved(
        SamplingParams(
            n=2, best_of=3, presence_penalty=1, frequency_penalty=1, repetition_penalty=1.5, temperature=0.5, top_p=0.5,
            top_k=5, min_p=0.1, seed=1, stop=["a"], stop_token_ids=[3], include_stop_str_in_output=True,
            ignore_eos=True, max_tokens=None, min_tokens=3, logprobs=2, prompt_logprobs=2, skip_special_tokens=False,
            spaces_between_special_tokens=False, truncate_prompt_tokens=5, logit_bias={1: 1.0}, bad_words=["b"],
        ),
        serves_logits_processors=False,
    )  # fmt: skip


def test_clone_is_independent():
    params = SamplingParams(
        stop_token_ids=[1], stop=["a"], logit_bias={1: 1.0}, bad_words=["b"], logits_processors=[len]
    )
    copy = params.clone()
    assert copy == params
    copy.stop_token_ids.append(2)
    copy.stop.append("c")
    copy.logit_bias[2] = 1.0
    copy.bad_words.append("d")
    copy.logits_processors.append(len)
    assert (params.stop_token_ids, params.stop, params.logit_bias) == ([1], ["a"], {1: 1.0})
    assert (params.bad_words, params.logits_processors) == (["b"], [len])


def test_log_probabilities_are_watched_where_shown_or_ranked_by():
    assert not SamplingParams(n=2).watches_logprobs
    assert SamplingParams(logprobs=0).watches_logprobs
    assert SamplingParams(n=2, best_of=3).watches_logprobs
