"""What a body may hold: every wrong type is told with its place, every field that is not served with its name."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from dist_vlm.server.errors import ApiError
from dist_vlm.server.fields import (
    REFUSED,
    ChatFields,
    CompletionFields,
    DetokenizeFields,
    Fields,
    SamplingFields,
    TokenizeFields,
    read_fields,
    short,
)

MESSAGES = [{"role": "user", "content": "hi"}]
LEAST: dict[type[Fields], dict[str, Any]] = {
    ChatFields: {"messages": MESSAGES},
    CompletionFields: {"prompt": "hi"},
    TokenizeFields: {},
    DetokenizeFields: {"tokens": [1]},
}


def chat(**more: Any) -> ChatFields:
    return read_fields(ChatFields, {"messages": MESSAGES, **more})


def completion(**more: Any) -> CompletionFields:
    return read_fields(CompletionFields, {"prompt": "hi", **more})


def refused(kind: type[Fields] = ChatFields, /, **more: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read_fields(kind, {**LEAST[kind], **more})
    error = caught.value
    assert error.status == 400
    json.dumps(error.body, ensure_ascii=False, allow_nan=False).encode()  # as it is sent
    return error


# ------------------------------------------------------------------ accepted


@pytest.mark.parametrize("kind", LEAST)
def test_null_means_absent(kind: type[Fields]) -> None:
    optional = {name: None for name, field in kind.model_fields.items() if not field.is_required()}
    assert len(optional) >= 1
    absent, null = read_fields(kind, LEAST[kind]), read_fields(kind, {**LEAST[kind], **optional})
    assert absent == null
    assert all(getattr(absent, name) is None for name in optional)


def test_a_whole_body_is_read_as_it_was_written() -> None:
    sampling = {
        "model": "m",
        "frequency_penalty": -1.5,
        "presence_penalty": 1,
        "repetition_penalty": 1.25,
        "logit_bias": {"5": 2, "7": -0.5},
        "max_tokens": 3,
        "min_tokens": 2,
        "n": 2,
        "best_of": 4,
        "seed": 2**62,
        "stop": ["a", "b"],
        "stop_token_ids": [1, 2],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "top_p": 1,
        "top_k": -1,
        "min_p": 0.5,
        "ignore_eos": False,
        "bad_words": ["x"],
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "include_stop_str_in_output": False,
        "echo": False,
        "user": "u",
        "cache_salt": "s",
    }
    chats = {
        "messages": MESSAGES,
        "max_completion_tokens": 4,
        "logprobs": True,
        "top_logprobs": 2,
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "auto",
        "add_generation_prompt": True,
        "add_special_tokens": False,
        "chat_template_kwargs": {"thinking": False},
    }
    completions = {"prompt": [[1, 2], [3]], "logprobs": 5, "truncate_prompt_tokens": 9}
    assert sampling.keys() == SamplingFields.model_fields.keys()
    assert sampling.keys() | chats.keys() == ChatFields.model_fields.keys()
    assert sampling.keys() | completions.keys() == CompletionFields.model_fields.keys()
    for kind, body in ((ChatFields, {**sampling, **chats}), (CompletionFields, {**sampling, **completions})):
        before = json.dumps(body)
        assert read_fields(kind, body).model_dump() == body
        assert json.dumps(body) == before


def test_a_whole_number_is_a_number() -> None:
    fields = chat(temperature=1, top_p=1, frequency_penalty=0, logit_bias={"3": -100})
    assert (fields.temperature, fields.top_p, fields.frequency_penalty, fields.logit_bias) == (1, 1, 0, {"3": -100})


@pytest.mark.parametrize("stop", ["a", ["a", "b"], [], ""])
def test_stop_is_a_string_or_several(stop: Any) -> None:
    """Whether one may be empty is said where stop strings are used."""
    assert chat(stop=stop).stop == stop


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], [[1], [2, 3]], [], ["a", 1]])
def test_a_prompt_is_of_any_form(prompt: Any) -> None:
    """Which mixtures make no sense is said where prompts are taken apart."""
    assert completion(prompt=prompt).prompt == prompt


@pytest.mark.parametrize("choice", ["none", "auto", None])
def test_tools_that_are_not_forced_are_taken(choice: str | None) -> None:
    assert chat(tool_choice=choice).tool_choice == choice


# --------------------------------------------------------------- wrong types

_INTEGER, _NUMBER, _TRUTH = "must be an integer", "must be a number", "must be true or false"
_STRING, _LIST, _OBJECT = "must be a string", "must be a list", "must be a JSON object"
_STOP = "must be a string or a list of strings"
_PROMPT = "must be a string, a list of strings, a list of token ids, or a list of such lists"


_OF_A_TYPE: list[tuple[tuple[str, ...], tuple[Any, ...], str]] = [
    (("n", "best_of", "seed", "max_tokens", "min_tokens", "top_k"),
     (True, False, "1", "", 1.0, 1.5, [1], {}), _INTEGER),
    (("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
     (True, "0.5", "", [0.5], {}), _NUMBER),
    (("stream", "echo", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens",
      "include_stop_str_in_output"), (0, 1, "true", "", [], 1.0), _TRUTH),
    (("model", "user", "cache_salt"), (0, True, 1.5, ["m"], {}), _STRING),
    (("stop_token_ids", "bad_words"), (0, "1", {}, True), _LIST),
    (("logit_bias", "stream_options"), (0, "1", [], True), _OBJECT),
    (("stop",), (0, True, 1.5, {}, {"a": "b"}), _STOP),
]  # fmt: skip


def test_every_field_of_sampling_has_a_type_here() -> None:
    assert {name for names, _, _ in _OF_A_TYPE for name in names} == SamplingFields.model_fields.keys()


@pytest.mark.parametrize("kind", [ChatFields, CompletionFields])
@pytest.mark.parametrize(("names", "wrong", "allowed"), _OF_A_TYPE)
def test_a_wrong_type_is_told_with_field_value_and_what_is_allowed(
    kind: type[Fields], names: tuple[str, ...], wrong: tuple[Any, ...], allowed: str
) -> None:
    for name in names:
        for value in wrong:
            error = refused(kind, **{name: value})
            assert error.message == f"{name} = {value!r}: {allowed}"
            assert (error.param, error.code) == (name, None)


@pytest.mark.parametrize(
    ("kind", "given", "place", "rest"),
    [
        (ChatFields, {"stop": ["a", 1]}, "stop[1]", f" = 1: {_STRING}"),
        (ChatFields, {"stop": [None]}, "stop[0]", f" = None: {_STRING}"),
        (ChatFields, {"stop_token_ids": [1, 2, "3"]}, "stop_token_ids[2]", f" = '3': {_INTEGER}"),
        (ChatFields, {"stop_token_ids": [True]}, "stop_token_ids[0]", f" = True: {_INTEGER}"),
        (ChatFields, {"bad_words": [5]}, "bad_words[0]", f" = 5: {_STRING}"),
        (ChatFields, {"logit_bias": {"1": 0, "5": "x"}}, "logit_bias.5", f" = 'x': {_NUMBER}"),
        (ChatFields, {"logit_bias": {"5": None}}, "logit_bias.5", f" = None: {_NUMBER}"),
        (ChatFields, {"logit_bias": {"str": True}}, "logit_bias.str", f" = True: {_NUMBER}"),
        (ChatFields, {"logit_bias": {"[key]": True}}, "logit_bias.[key]", f" = True: {_NUMBER}"),
        (ChatFields, {"stream_options": {"include_usage": 1}}, "stream_options.include_usage", f" = 1: {_TRUTH}"),
        (ChatFields, {"messages": []}, "messages", " = []: must have at least one entry"),
        (ChatFields, {"messages": None}, "messages", f" = None: {_LIST}"),
        (ChatFields, {"messages": "hi"}, "messages", f" = 'hi': {_LIST}"),
        (ChatFields, {"messages": {"role": "user"}}, "messages", f" = {{'role': 'user'}}: {_LIST}"),
        (ChatFields, {"messages": [*MESSAGES, "hi"]}, "messages[1]", f" = 'hi': {_OBJECT}"),
        (ChatFields, {"messages": [None]}, "messages[0]", f" = None: {_OBJECT}"),
        (ChatFields, {"tools": {}}, "tools", f" = {{}}: {_LIST}"),
        (ChatFields, {"tools": [{}, []]}, "tools[1]", f" = []: {_OBJECT}"),
        (ChatFields, {"chat_template_kwargs": [1]}, "chat_template_kwargs", f" = [1]: {_OBJECT}"),
        (ChatFields, {"logprobs": 5}, "logprobs", f" = 5: {_TRUTH}"),
        (ChatFields, {"top_logprobs": True}, "top_logprobs", f" = True: {_INTEGER}"),
        (ChatFields, {"max_completion_tokens": "5"}, "max_completion_tokens", f" = '5': {_INTEGER}"),
        (ChatFields, {"add_generation_prompt": 1}, "add_generation_prompt", f" = 1: {_TRUTH}"),
        (ChatFields, {"add_special_tokens": "no"}, "add_special_tokens", f" = 'no': {_TRUTH}"),
        (CompletionFields, {"prompt": 5}, "prompt", f" = 5: {_PROMPT}"),
        (CompletionFields, {"prompt": None}, "prompt", f" = None: {_PROMPT}"),
        (CompletionFields, {"prompt": {"text": "a"}}, "prompt", f" = {{'text': 'a'}}: {_PROMPT}"),
        (CompletionFields, {"logprobs": True}, "logprobs", f" = True: {_INTEGER}"),
        (CompletionFields, {"truncate_prompt_tokens": 1.5}, "truncate_prompt_tokens", f" = 1.5: {_INTEGER}"),
        (TokenizeFields, {"prompt": ["a"]}, "prompt", f" = ['a']: {_STRING}"),
        (TokenizeFields, {"messages": [1]}, "messages[0]", f" = 1: {_OBJECT}"),
        (DetokenizeFields, {"tokens": 5}, "tokens", f" = 5: {_LIST}"),
        (DetokenizeFields, {"tokens": [1, "2"]}, "tokens[1]", f" = '2': {_INTEGER}"),
        (DetokenizeFields, {"tokens": [1, 2.0]}, "tokens[1]", f" = 2.0: {_INTEGER}"),
    ],
)  # fmt: skip
def test_the_place_of_a_wrong_type_is_told(kind: type[Fields], given: dict[str, Any], place: str, rest: str) -> None:
    error = refused(kind, **given)
    assert error.message == place + rest
    assert error.param == place


@pytest.mark.parametrize("name", ["temperature", "top_p", "frequency_penalty"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_are_finite(name: str, value: float) -> None:
    assert refused(**{name: value}).message == f"{name} = {value!r}: must be a finite number"


@pytest.mark.parametrize(
    ("kind", "name"), [(ChatFields, "messages"), (CompletionFields, "prompt"), (DetokenizeFields, "tokens")]
)
def test_a_field_that_is_needed_is_missed(kind: type[Fields], name: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_fields(kind, {})
    assert caught.value.message == f"{name} is missing"
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, name, "missing_field")


def test_of_several_wrong_fields_one_is_told_with_its_own_place() -> None:
    """The deepest place of another field is no better a message."""
    error = refused(messages=[1], n="x", stream_options={"include_usage": 1})
    assert error.message in ("n = 'x': must be an integer", "messages[0] = 1: must be a JSON object")
    assert error.message.startswith(error.param or "-")


# ------------------------------------------------------------ unknown fields


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("temprature", "temperature"),
        ("max_token", "max_tokens"),
        ("Messages", "messages"),
        ("topp", "top_p"),
        ("stream_option", "stream_options"),
        ("zzz", None),
        ("", None),
        ("str", "stream"),
        ("__class__", None),
        ("model_config", None),
        ("model_fields", None),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest(name: str, nearest: str | None) -> None:
    for value in (1, None):
        error = refused(**{name: value})
        assert error.message.startswith(f"{name!r} is no field of this request")
        if nearest is not None:
            assert error.message.endswith(f"; the nearest is {nearest}")
        assert (error.param, error.code) == (name, "unknown_field")


def test_a_field_of_another_request_is_unknown() -> None:
    assert refused(prompt="x").code == "unknown_field"
    assert refused(CompletionFields, messages=MESSAGES).code == "unknown_field"
    assert refused(TokenizeFields, temperature=1).code == "unknown_field"
    assert refused(DetokenizeFields, prompt="x").code == "unknown_field"


def test_an_unknown_option_of_streams_is_refused_with_the_nearest() -> None:
    error = refused(stream_options={"include_usge": True})
    assert error.message == "'include_usge' is no field of this request; the nearest is include_usage"
    assert (error.param, error.code) == ("stream_options.include_usge", "unknown_field")


def test_the_first_unknown_field_is_told() -> None:
    for first, second in (("foo", "bar"), ("bar", "foo"), ("guided_json", "foo"), ("foo", "guided_json")):
        assert refused(**{first: 1, second: 1}).param == first


# ----------------------------------------------------------- fields not served

# Values that ask for nothing, and one that asks for something.
NOT_SERVED: dict[str, tuple[list[Any], list[Any]]] = {
    "audio": ([], [{"voice": "alloy"}]),
    "chat_template": ([], ["{{ messages }}", ""]),
    "documents": ([[]], [[{"text": "a"}]]),
    "early_stopping": ([False], [True, "never", 0]),
    "function_call": (["none"], ["auto", {"name": "f"}]),
    "functions": ([[]], [[{"name": "f"}]]),
    "guided_choice": ([], [["a", "b"]]),
    "guided_decoding_backend": ([], ["outlines"]),
    "guided_grammar": ([], ["root ::= 'a'"]),
    "guided_json": ([], [{}, "{}"]),
    "guided_regex": ([], ["a+"]),
    "guided_whitespace_pattern": ([], [" "]),
    "length_penalty": ([1, 1.0], [0, 1.5, True]),
    "modalities": ([["text"]], [["text", "audio"], []]),
    "parallel_tool_calls": ([True], [False, 1]),
    "prediction": ([], [{"type": "content", "content": "a"}]),
    "response_format": ([{"type": "text"}], [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}]),
    "suffix": ([""], ["b"]),
    "use_beam_search": ([False], [True, 0]),
    "web_search_options": ([], [{}]),
}


def test_every_field_that_is_not_served_is_in_this_test() -> None:
    assert NOT_SERVED.keys() == REFUSED.keys()
    assert not REFUSED.keys() & (ChatFields.model_fields.keys() | CompletionFields.model_fields.keys())


@pytest.mark.parametrize("name", NOT_SERVED)
@pytest.mark.parametrize("kind", [ChatFields, CompletionFields])
def test_a_field_that_is_not_served_is_refused_unless_it_asks_for_nothing(kind: type[Fields], name: str) -> None:
    neutral, asking = NOT_SERVED[name]
    for value in [*neutral, None]:
        assert read_fields(kind, {**LEAST[kind], name: value}) == read_fields(kind, LEAST[kind])
    for value in asking:
        error = refused(kind, **{name: value})
        assert error.message.startswith(f"{name} = {value!r}: is not served") or "served" in error.message
        assert (error.param, error.code) == (name, "unsupported_parameter")
        assert len(error.message.rpartition(": ")[2]) > 10, "it says what to do instead"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}, "", 1, [], "\ud800"])
def test_a_forced_tool_is_refused(choice: Any) -> None:
    error = refused(tool_choice=choice, tools=[{}])
    assert (error.param, error.code) == ("tool_choice", "unsupported_parameter")
    assert "'none' and 'auto'" in error.message


# ---------------------------------------------------------------- huge values


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": "x" * 1_000_000},
        {"temperature": ["x" * 1000] * 1000},
        {"temperature": [[[[[["x" * 90] * 6] * 6] * 6] * 6] * 6]},
        {"temperature": {"k" * 1_000_000: ["v" * 1_000_000]}},
        {"temperature": {str(key): key for key in range(10_000)}},
        {"temperature": 10**4000},
        {"n": "9" * 1_000_000},
        {"n": 1.0e300},
        {"stop": [1] * 10_000},
        {"messages": ["x" * 1_000_000]},
        {"x" * 1_000_000: 1},
        {"\ud800" * 1000: 1},
        {"stream_options": {"x" * 1_000_000: 1}},
        {"stream_options": {"\ud800": 1}},
        {"logit_bias": {"1" * 1_000_000: "x"}},
        {"logit_bias": {"\ud800": "x"}},
        {"guided_json": {"a": ["x" * 100_000] * 100}},
        {"tool_choice": "x" * 1_000_000},
    ],
    ids=lambda given: repr(given)[:30].encode("ascii", "replace").decode(),
)
def test_a_huge_value_is_not_echoed_whole(given: dict[str, Any]) -> None:
    error = refused(**given)
    assert len(error.message) < 500
    assert len(error.param or "") < 120


@pytest.mark.parametrize(
    "given",
    [
        {"messages": [1] * 500_000},
        {"tools": [1] * 500_000},
        {"stop": [1] * 500_000},
        {"logit_bias": dict.fromkeys(map(str, range(200_000)), "x")},
        {"stream_options": dict.fromkeys(map(str, range(200_000)), "x")},
        {"model": dict.fromkeys(map(str, range(200_000)), "x")},
        dict.fromkeys(map(str, range(200_000)), "x"),
    ],
    ids=lambda given: next(iter(given)),
)
def test_very_many_wrong_values_do_not_hold_the_event_loop(given: dict[str, Any]) -> None:
    began = time.process_time()
    refused(**given)
    assert time.process_time() - began < 0.25


def test_very_many_wrong_tokens_are_told_by_the_first() -> None:
    began = time.process_time()
    assert refused(DetokenizeFields, tokens=[1] + ["x"] * 500_000).param == "tokens[1]"
    assert time.process_time() - began < 0.25


def test_prompts_of_very_many_tokens_are_read() -> None:
    tokens = list(range(100_000))
    assert completion(prompt=tokens).prompt == tokens
    assert read_fields(DetokenizeFields, {"tokens": tokens}).tokens == tokens


def test_a_short_value_is_shown_as_it_is() -> None:
    for value in ("a" * 70, 5, -0.5, None, True, [1, "b"], {"a": 1, "b": [2]}):
        assert short(value) == repr(value)


# -------------------------------------------------------------------- schema


def test_the_schema_says_what_is_read() -> None:
    """Clients' generators go by it."""
    schema = ChatFields.model_json_schema()
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["messages"]
    assert schema["properties"].keys() == ChatFields.model_fields.keys()
    assert {"type": "integer"} in schema["properties"]["n"]["anyOf"]
    tokens = DetokenizeFields.model_json_schema()["properties"]["tokens"]
    assert (tokens["type"], tokens["items"]) == ("array", {"type": "integer"})
