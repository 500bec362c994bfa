"""Errors in OpenAI's form, their `param` read out of messages that the engine's own checks really write."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, get_args

import httpx
import openai
import pytest
from PIL import Image

from dist_vlm.config import EngineConfig
from dist_vlm.engine.chat import ChatOptions
from dist_vlm.engine.chat_content import parse_messages
from dist_vlm.engine.front import Front, load_front
from dist_vlm.engine.images import PreparedImage
from dist_vlm.inputs import parse_and_batch_prompt
from dist_vlm.media import PictureError
from dist_vlm.media.fetch_error import Code, FetchError
from dist_vlm.media.picture_source import open_data_url
from dist_vlm.sampling import SamplingParams
from dist_vlm.server.errors import ApiError, api_error
from dist_vlm.server.fields import ChatFields, CompletionFields, read_fields
from dist_vlm.server.sampling import chat_sampling, completion_sampling


@pytest.fixture(scope="module")
def front(server_engine: EngineConfig) -> Front:
    return load_front(server_engine)


def provoked(work: Callable[[], object]) -> ApiError:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - what it says is looked at by the callers
        work()
    return api_error(caught.value)


# ---------------------------------------------------------------------- form

OPENAI_TYPES = {
    400: ("invalid_request_error", openai.BadRequestError),
    401: ("authentication_error", openai.AuthenticationError),
    403: ("permission_error", openai.PermissionDeniedError),
    404: ("not_found_error", openai.NotFoundError),
    408: ("timeout_error", openai.APIStatusError),
    413: ("invalid_request_error", openai.APIStatusError),
    415: ("invalid_request_error", openai.APIStatusError),
    422: ("invalid_request_error", openai.UnprocessableEntityError),
    429: ("rate_limit_error", openai.RateLimitError),
    500: ("server_error", openai.InternalServerError),
    503: ("service_unavailable_error", openai.InternalServerError),
    418: ("invalid_request_error", openai.APIStatusError),
    507: ("server_error", openai.InternalServerError),
}


@pytest.mark.parametrize("status", OPENAI_TYPES)
def test_the_official_client_raises_what_it_raises_for_openai(status: int) -> None:
    kind, expected = OPENAI_TYPES[status]
    error = ApiError(status, "no", param="n", code="c")
    assert error.body == {"error": {"message": "no", "type": kind, "param": "n", "code": "c"}}
    transport = httpx.MockTransport(lambda request: httpx.Response(status, json=error.body, headers=error.headers))
    http = httpx.Client(transport=transport)
    client = openai.OpenAI(api_key="k", base_url="http://x", max_retries=0, http_client=http)
    with http, pytest.raises(expected) as caught:
        client.models.list()
    read = caught.value
    assert isinstance(read, openai.APIStatusError)
    assert (read.status_code, read.param, read.code, read.type) == (status, "n", "c", kind)


def test_when_to_come_back_is_a_header() -> None:
    assert ApiError(429, "no", retry_after_s=7).headers == {"Retry-After": "7"}
    assert ApiError(429, "no").headers == {}


# --------------------------------------------------------- messages that occur

PNG = "data:image/png;base64,"
TEXT = {"type": "text", "text": "hi"}


def user(content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **more}]


def picture(url: Any, **more: Any) -> list[dict[str, Any]]:
    return user([TEXT, {"type": "image_url", "image_url": {"url": url, **more}}])


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([{"role": "boss", "content": "hi"}], "messages[0].role"),
        ([{"content": "hi"}], "messages[0].role"),
        ([*user("a"), {"role": "user"}], "messages[1]"),
        (user("hi", foo=1), "messages[0]"),
        (user("hi", name=5), "messages[0].name"),
        (user(5), "messages[0].content"),
        (user([]), "messages[0].content"),
        (user("\ud800"), "messages[0].content"),
        (user([5]), "messages[0].content[0]"),
        (user([TEXT, {"type": "audio"}]), "messages[0].content[1].type"),
        (user([{"type": "text", "text": 5}]), "messages[0].content[0].text"),
        (user([{"type": "text", "text": "\udfff"}]), "messages[0].content[0].text"),
        (user([{**TEXT, "x": 1}]), "messages[0].content[0]"),
        (user([{"type": "image_url", "image_url": "http://x"}]), "messages[0].content[0].image_url"),
        (picture(5), "messages[0].content[1].image_url.url"),
        (picture("file:///etc/passwd"), "messages[0].content[1].image_url.url"),
        (picture("/etc/passwd"), "messages[0].content[1].image_url.url"),
        (picture("http://127.0.0.1/"), "messages[0].content[1].image_url.url"),
        (picture(PNG, detail="huge"), "messages[0].content[1].image_url.detail"),
        (picture(PNG, other=1), "messages[0].content[1].image_url"),
        (user([{"type": "image", "image": "x"}]), "messages[0].content[0].image"),
        ([{"role": "assistant", "tool_calls": 5}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function.name"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": ["\ud800"]}}}]}],
            "messages[0].tool_calls[0].function.arguments.a[0]",
        ),
    ],
)
def test_a_message_that_is_wrong_is_blamed_at_its_place(messages: Any, param: str) -> None:
    error = provoked(lambda: parse_messages(messages))
    assert (error.status, error.param) == (400, param)
    assert error.message.startswith(param)


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"min_p": -1}, "min_p"),
        ({"seed": -5}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 20}, "min_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a" * 2000]}, "stop"),
        ({"stop": ["\ud800"]}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": list(range(300))}, "stop_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"logit_bias": {-1: 0}}, "logit_bias"),
        ({"logit_bias": {5: 200}}, "logit_bias[5]"),
        ({"logit_bias": dict.fromkeys(range(400), 1)}, "logit_bias"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ],
)
def test_a_sampling_parameter_out_of_range_is_blamed(params: dict[str, Any], param: str) -> None:
    error = provoked(lambda: SamplingParams(**params))
    assert (error.status, error.param, error.code) == (400, param, None)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"top_logprobs": -5, "logprobs": True}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
    ],
)
def test_a_field_of_a_chat_is_blamed(given: dict[str, Any], param: str) -> None:
    fields = read_fields(ChatFields, {"messages": user("hi"), **given})
    assert provoked(lambda: chat_sampling(fields)).param == param


def test_a_field_of_a_completion_is_blamed() -> None:
    fields = read_fields(CompletionFields, {"prompt": "hi", "logprobs": -1})
    assert provoked(lambda: completion_sampling(fields)).param == "logprobs"


@pytest.mark.parametrize("prompt", [["a", 1], [[]], [[1], "a"], [True], [1.5], [{"a": 1}], [[1], [True]]])
def test_a_prompt_of_no_form_is_blamed_under_the_clients_name(prompt: Any) -> None:
    assert provoked(lambda: parse_and_batch_prompt(prompt)).param == "prompt"


@pytest.mark.parametrize(
    ("inputs", "params", "param"),
    [
        ("", {}, "prompt"),
        ("a\ud800", {}, "prompt"),
        ({"prompt_token_ids": []}, {}, "prompt"),
        ({"prompt_token_ids": [10**9]}, {}, "prompt"),
        ({"prompt_token_ids": [-1]}, {}, "prompt"),
        ({"prompt": "a", "cache_salt": 5}, {}, "cache_salt"),
        ({"prompt": "a", "cache_salt": "x" * 300}, {}, "cache_salt"),
        ({"prompt": "a", "cache_salt": "\ud800"}, {}, "cache_salt"),
        ({"prompt": "a", "multi_modal_data": {"image": [Image.new("RGB", (9, 9))] * 99}}, {}, "messages"),
        ("a", {"logprobs": 99}, "logprobs"),
        ("a", {"stop_token_ids": [10**6]}, "stop_token_ids"),
        ("a", {"logit_bias": {10**6: 1}}, "logit_bias"),
        ({"prompt_token_ids": [5] * 1000}, {}, None),
        ("<image>", {}, None),
    ],
)
def test_a_prompt_that_the_engine_refuses_is_blamed_under_the_clients_name(
    front: Front, inputs: Any, params: dict[str, Any], param: str | None
) -> None:
    error = provoked(lambda: front.processor.process("r", inputs, SamplingParams(**params)))
    assert (error.status, error.param) == (400, param)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"template_kwargs": {"tools": 1}}, "chat_template_kwargs"),
        ({"template_kwargs": {"a": {"b": ["\ud800"]}}}, "chat_template_kwargs.a.b[0]"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"a": "\ud800"}]}, "tools[0].a"),
    ],
)
def test_what_a_template_is_given_is_blamed_under_the_clients_name(
    front: Front, options: dict[str, Any], param: str
) -> None:
    conversation = parse_messages(user("hi"))
    error = provoked(lambda: front.chat.render_text(conversation, ChatOptions(**options)))
    # The test's template may have no place for tools.
    assert error.param == param or (param.startswith("tools") and error.param == "tools")


def test_the_number_of_pictures_is_blamed_on_the_messages(front: Front) -> None:
    error = provoked(lambda: front.processor.check_size([5] * 10, 99))
    assert error.param == "messages"


# ------------------------------------------------------------------ pictures


@pytest.mark.parametrize("code", get_args(Code))
def test_a_picture_that_could_not_be_fetched_is_a_422_with_the_cause(code: Code) -> None:
    name = "messages[1].content[0]"
    error = api_error(FetchError("no answer within 5 s", code=code, name=name))
    assert (error.status, error.code, error.param) == (422, f"image_{code}", name)
    assert error.message == f"{name}: no answer within 5 s"
    assert error.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("url", ["data:text/html;base64,AAAA", PNG + "!", PNG + "AAAA", PNG])
def test_bytes_that_are_no_picture_are_a_400(url: str) -> None:
    error = provoked(lambda: open_data_url(url, name="messages[0].content[2]"))
    assert (error.status, error.code, error.param) == (400, "invalid_image", "messages[0].content[2]")


def test_a_file_is_refused_as_a_picture() -> None:
    error = provoked(lambda: parse_messages(picture("file:///etc/passwd"), fetches=True))
    assert (error.status, error.code) == (400, "invalid_image")


def test_any_other_value_has_no_code() -> None:
    assert api_error(ValueError("n = 0: must be 1")).code is None
    assert api_error(PictureError("x: y")).code == "invalid_image"


# ------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    "message",
    [
        "the prompt is 600 tokens long",
        "the chat template cannot render the messages (KeyError)",
        "Expecting value: line 1 column 1",
        "it failed",
        "please provide at least one prompt",
        "prompt and messages: exactly one of them must be given",
        "a b = 5",
        "",
    ],
)
def test_a_message_that_names_no_field_blames_none(message: str) -> None:
    error = api_error(ValueError(message))
    assert (error.param, error.message) == (None, message)


def test_a_long_message_keeps_its_field_and_what_is_allowed() -> None:
    error = api_error(ValueError(f"stop = {'x' * 4_000_000!r}: must be short"))
    assert error.param == "stop"
    assert error.message.startswith("stop = 'xxx")
    assert error.message.endswith("xxx': must be short")
    assert len(error.message) < 1100


def test_a_long_place_is_cut() -> None:
    """Clients choose the names in it."""
    error = provoked(lambda: parse_messages([{"role": "assistant", "tool_calls": [{"a" * 3_000_000: "\ud800"}]}]))
    assert error.param is not None
    assert re.fullmatch(r"messages\[0\]\.tool_calls\[0\]\.a+", error.param)
    assert len(error.param) <= 120
    assert len(error.message) < 1100


def test_a_prepared_picture_of_another_shape_blames_no_field(front: Front) -> None:
    """It is our own mistake, not one of the client's fields."""
    import numpy as np

    wrong = PreparedImage("k", "pixel_values", np.zeros((1, 3, 5, 5), np.float32))
    inputs: Any = {"prompt": "<image>", "multi_modal_data": {"image": [wrong]}}
    assert provoked(lambda: front.processor.process("r", inputs, SamplingParams())).param is None
