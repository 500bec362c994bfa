"""From fields to sampling parameters: defaults, names, and what is refused before a prompt is looked at."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dist_vlm.sampling import SamplingParams
from dist_vlm.server.errors import ApiError
from dist_vlm.server.fields import ChatFields, CompletionFields, SamplingFields, read_fields
from dist_vlm.server.sampling import chat_sampling, check_streaming, completion_sampling


def chat_fields(**more: Any) -> ChatFields:
    return read_fields(ChatFields, {"messages": [{"role": "user", "content": "hi"}], **more})


def completion_fields(**more: Any) -> CompletionFields:
    return read_fields(CompletionFields, {"prompt": "hi", **more})


def chat(**more: Any) -> SamplingParams:
    return chat_sampling(chat_fields(**more))


def completion(**more: Any) -> SamplingParams:
    return completion_sampling(completion_fields(**more))


# A value of each field that goes through as it is, none of them the default.
SAME: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "repetition_penalty": 1.5,
    "min_tokens": 1,
    "n": 2,
    "best_of": 3,
    "seed": 7,
    "stop": ["a", "b"],
    "stop_token_ids": [1, 2],
    "temperature": 0.25,
    "top_p": 0.75,
    "top_k": 5,
    "min_p": 0.125,
    "ignore_eos": True,
    "bad_words": ["x"],
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "include_stop_str_in_output": True,
}
# What goes under another form or name, and what is no matter of sampling.
OTHERS = {"logit_bias", "max_tokens", "model", "stream", "stream_options", "echo", "user", "cache_salt"}


def test_every_field_is_in_this_test() -> None:
    assert SAME.keys() | OTHERS == SamplingFields.model_fields.keys()


def test_the_defaults_are_openais_and_otherwise_those_of_sampling_params() -> None:
    assert chat() == SamplingParams(temperature=0.7, max_tokens=None)
    assert completion() == SamplingParams(temperature=1.0, max_tokens=16)


@pytest.mark.parametrize("name", [name for name in SAME if name != "best_of"])
def test_a_field_changes_its_own_parameter_and_no_other(name: str) -> None:
    for given, default in ((chat(**{name: SAME[name]}), chat()), (completion(**{name: SAME[name]}), completion())):
        changed = {
            item.name
            for item in dataclasses.fields(SamplingParams)
            if getattr(given, item.name) != getattr(default, item.name)
        }
        assert changed == ({"n", "best_of"} if name == "n" else {name})
        assert getattr(given, name) == SAME[name]


def test_all_together() -> None:
    expected = SamplingParams(**SAME, max_tokens=9, logit_bias={5: 1.0, 0: -100.0})
    bias = {"5": 1, "0": -100}
    assert chat(**SAME, max_tokens=9, logit_bias=bias) == expected
    assert completion(**SAME, max_tokens=9, logit_bias=bias) == expected


def test_temperature_zero_is_kept() -> None:
    assert chat(temperature=0).is_greedy
    assert completion(temperature=0).is_greedy


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 7, "max_completion_tokens": 7}, 7),
        ({"max_tokens": None, "max_completion_tokens": 8}, 8),
        ({"max_tokens": 9, "max_completion_tokens": None}, 9),
    ],
)
def test_max_tokens_has_two_names_in_a_chat(given: dict[str, Any], expected: int | None) -> None:
    assert chat(**given).max_tokens == expected


@pytest.mark.parametrize(
    ("given", "logprobs"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 0}, 0),
        ({"logprobs": True, "top_logprobs": 5}, 5),
    ],
)
def test_log_probabilities_of_a_chat(given: dict[str, Any], logprobs: int | None) -> None:
    params = chat(**given)
    assert (params.logprobs, params.prompt_logprobs) == (logprobs, None)


@pytest.mark.parametrize(
    ("given", "answer", "prompt"),
    [
        ({}, None, None),
        ({"logprobs": 0}, 0, None),
        ({"logprobs": 5}, 5, None),
        ({"logprobs": 5, "echo": True}, 5, 5),
        ({"logprobs": 0, "echo": True}, 0, 0),
        ({"echo": True}, None, None),
    ],
)
def test_log_probabilities_of_a_completion(given: dict[str, Any], answer: int | None, prompt: int | None) -> None:
    params = completion(**given)
    assert (params.logprobs, params.prompt_logprobs) == (answer, prompt)


def test_prompts_are_truncated_where_asked() -> None:
    assert completion(truncate_prompt_tokens=5).truncate_prompt_tokens == 5


@pytest.mark.parametrize(
    ("given", "beginning"),
    [
        ({"n": 0}, "n = 0: must be"),
        ({"n": 10**6}, "n = 1000000: must be"),
        ({"n": 2, "best_of": 1}, "best_of = 1: must be at least n = 2"),
        ({"temperature": -0.1}, "temperature = -0.1: must be"),
        ({"temperature": 1e308}, "temperature = 1e+308: must be"),
        ({"top_p": 0}, "top_p = 0.0: must be in (0, 1]"),
        ({"top_p": 1.01}, "top_p = 1.01: must be in (0, 1]"),
        ({"top_k": 0}, "top_k = 0: must be"),
        ({"seed": -2}, "seed = -2: must be"),
        ({"seed": 2**63}, f"seed = {2**63}: must be"),
        ({"max_tokens": 0}, "max_tokens = 0: must be"),
        ({"min_tokens": -1}, "min_tokens = -1: must be"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens = 9: must be at most max_tokens = 8"),
        ({"stop": ""}, "stop = ['']: must"),
        ({"stop": ["a"] * 17}, "stop has 17 entries"),
        ({"stop_token_ids": [-1]}, "stop_token_ids = -1: must be"),
        ({"presence_penalty": 2.5}, "presence_penalty = 2.5: must be in [-2, 2]"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5] = 101.0: must be in [-100, 100]"),
        ({"temperature": 0, "best_of": 2}, "best_of = 2: must be 1"),
        *(({"logit_bias": {key: 1}}, f"logit_bias has the key {key!r}: must be a token id")
          for key in ("", "-1", "1.0", "a", "01", " 1", "1_0", "²", "٣", "1" * 11)),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_told_with_its_field(given: dict[str, Any], beginning: str) -> None:
    for sample in (chat, completion):
        with pytest.raises(ValueError, match=" = | has ") as caught:
            sample(**given)
        assert str(caught.value).startswith(beginning)


def test_a_long_key_of_logit_bias_is_not_echoed_whole() -> None:
    with pytest.raises(ValueError, match="logit_bias has the key") as caught:
        chat(logit_bias={"9" * 100_000: 1})
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_logprobs": 2}, "top_logprobs = 2: needs logprobs = true"),
        ({"top_logprobs": 2, "logprobs": False}, "top_logprobs = 2: needs logprobs = true"),
        ({"top_logprobs": -1, "logprobs": True}, "top_logprobs = -1: must be an integer, at least 0"),
        ({"max_completion_tokens": 0}, "max_completion_tokens = 0: must be an integer, at least 1"),
        ({"max_completion_tokens": -5, "max_tokens": -5}, "max_completion_tokens = -5: must be an integer, at least 1"),
        (
            {"max_completion_tokens": 5, "max_tokens": 6},
            "max_completion_tokens = 5: contradicts max_tokens = 6; give one of them",
        ),
    ],
)
def test_what_only_a_chat_may_get_wrong(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=" = | has ") as caught:
        chat(**given)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("given", "beginning"),
    [
        ({"logprobs": -1}, "logprobs = -1: must be an integer, at least 0"),
        ({"logprobs": -1, "echo": True}, "logprobs = -1: must be an integer, at least 0"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens = 0: must be"),
    ],
)
def test_what_only_a_completion_may_get_wrong(given: dict[str, Any], beginning: str) -> None:
    with pytest.raises(ValueError, match=" = | has ") as caught:
        completion(**given)
    assert str(caught.value).startswith(beginning)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"stream": False},
        {"stream": True},
        {"stream": True, "stream_options": {}},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": True, "n": 3, "best_of": 3},
        {"stream": True, "best_of": 1},
        {"n": 1, "best_of": 3},
    ],
)
def test_what_may_be_streamed(given: dict[str, Any]) -> None:
    check_streaming(chat_fields(**given))
    check_streaming(completion_fields(**given))


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {}, "stream": False}, "stream_options"),
        ({"stream": True, "best_of": 2}, "best_of"),
        ({"stream": True, "n": 2, "best_of": 3}, "best_of"),
    ],
)
def test_what_may_not(given: dict[str, Any], param: str) -> None:
    for fields in (chat_fields(**given), completion_fields(**given)):
        with pytest.raises(ApiError) as caught:
            check_streaming(fields)
        assert (caught.value.status, caught.value.param) == (400, param)
        assert caught.value.message.startswith(param)
