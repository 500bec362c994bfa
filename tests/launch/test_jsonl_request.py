from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dist_vlm import SamplingParams
from dist_vlm.config import EngineConfig, resolve
from dist_vlm.engine.chat import ChatRenderer
from dist_vlm.engine.front import load_chat, load_tokenizer
from dist_vlm.executor.base import ExecutorError
from dist_vlm.launch.jsonl import Line
from dist_vlm.launch.jsonl_request import LineRequest, RequestReader, answer_of, line_faults
from dist_vlm.outputs import CompletionOutput, Logprob, RequestOutput

DATA_URL = "data:image/png;base64,AAAA"


@pytest.fixture(scope="module")
def config(tiny_facts: Path) -> EngineConfig:
    return resolve(EngineConfig.from_fields(model=str(tiny_facts), device="cpu", max_images_per_prompt=2))


@pytest.fixture(scope="module")
def chat(config: EngineConfig) -> ChatRenderer:
    return load_chat(config, load_tokenizer(config.model.model))


@pytest.fixture(scope="module")
def reader(config: EngineConfig) -> RequestReader:
    return reader_with(config, SamplingParams(temperature=0.5, max_tokens=128, seed=3))


def reader_with(config: EngineConfig, defaults: SamplingParams, seed: int = 0) -> RequestReader:
    return RequestReader(vision=config.vision, defaults=defaults, seed=seed)


def read(reader: RequestReader, index: int = 1, **values: Any) -> LineRequest:
    return reader.read(Line(index, index, values))


def test_a_bare_prompt_is_sampled_as_the_flags_say(reader: RequestReader, chat: ChatRenderer) -> None:
    request = read(reader, prompt="what?")
    assert request == LineRequest("what?", [], SamplingParams(temperature=0.5, max_tokens=128, seed=3))
    assert request.inputs(chat, []) == {"prompt": "what?"}


def test_a_lines_own_sampling_comes_first(reader: RequestReader) -> None:
    given: dict[str, Any] = {"n": 3, "stop": "x", "max_tokens": None, "seed": 9, "top_p": 0.5, "logprobs": 2}
    params = read(reader, prompt="what?", **given, logit_bias={"17": -5}).params
    assert params == SamplingParams(temperature=0.5, **given, logit_bias={17: -5})
    assert params.best_of == 3


def test_a_line_that_draws_without_a_seed_gets_its_own(config: EngineConfig) -> None:
    drawing, greedy = SamplingParams(temperature=1), SamplingParams(temperature=0)
    seeds = [
        read(reader_with(config, drawing, seed), index, prompt="a").params.seed for seed in (0, 1) for index in (1, 2)
    ]
    assert len(set(seeds)) == 4
    assert seeds[0] == read(reader_with(config, drawing), 1, prompt="something else").params.seed
    assert read(reader_with(config, drawing), prompt="a", seed=7).params.seed == 7
    assert read(reader_with(config, greedy), prompt="a").params.seed is None


def test_pictures_are_named_and_placed(reader: RequestReader, chat: ChatRenderer) -> None:
    names = ["red.png", DATA_URL]
    request = read(reader, prompt="what?", images=names)
    assert request.pictures == names
    inputs = request.inputs(chat, ["one", "two"])
    assert inputs["prompt"] == "USER: <image>\n<image>\nwhat? ASSISTANT:"
    assert inputs["multi_modal_data"] == {"image": ["one", "two"]}


def test_a_conversation_with_files_and_urls(reader: RequestReader, chat: ChatRenderer) -> None:
    messages = [
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "red.png", "detail": "low"}},
            {"type": "text", "text": "what?"},
        ]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [
            {"type": "text", "text": "and <image> now?"},
            {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        ]},
    ]  # fmt: skip
    request = read(reader, messages=messages, max_tokens=5)
    assert request.pictures == ["red.png", "https://example.com/a.png"]
    assert request.params.max_tokens == 5
    inputs = request.inputs(chat, ["one", "two"])
    assert inputs["prompt"] == "USER: <image>\nwhat? ASSISTANT: red USER: <image>\nand <image> now? ASSISTANT:"
    # What is typed in a text is no place of a picture.
    assert inputs["prompt_token_ids"].count(32000) == 2
    assert inputs["multi_modal_data"] == {"image": ["one", "two"]}


def test_long_urls_are_held_once(reader: RequestReader) -> None:
    url = DATA_URL * 1000
    request = read(reader, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
    assert request.pictures == [url]
    assert url not in repr(request.text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "prompt = None: must be a string"),
        ({"prompt": 5}, "prompt = 5: must be a string"),
        ({"prompt": "a", "promt": "b"}, "unknown key 'promt'; the nearest is prompt"),
        ({"prompt": "a", "max_token": 3}, "unknown key 'max_token'; the nearest is max_tokens"),
        ({"prompt": "a", "logits_processors": None}, "unknown key 'logits_processors'"),
        ({"prompt": "a", "top_p": 1.5}, "top_p = 1.5: must be in (0, 1]"),
        ({"prompt": "a", "temperature": None}, "temperature = None"),
        ({"prompt": "a", "stop": 5}, "stop of type int"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias has the key 'x': must be the number of a token"),
        ({"prompt": "a", "logit_bias": {"-1": 1}}, "logit_bias has the key '-1'"),
        ({"prompt": "a", "logit_bias": [1]}, "logit_bias = [1]"),
        ({"prompt": "a", "images": "red.png"}, "images of type str: must be a list of file names"),
        ({"prompt": "a", "images": ["absent.png"] * 3}, "the line has 3 pictures; at most 2 are allowed"),
        ({"prompt": "a", "messages": []}, "prompt and messages are both given"),
        ({"images": ["red.png"], "messages": []}, "images and messages are both given"),
        ({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "red.png", "detail": "most"}}]}]}, "detail = 'most'"),
        ({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "red.png"}}] * 3}]}, "the line has 3 pictures"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_told_by_name(reader: RequestReader, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read(reader, **values)


@pytest.mark.parametrize(
    "messages",
    ["text", 5, [5], [{"role": "user"}, {"role": "user", "content": 5}], [{"role": "user", "content": [5]}],
     [{"role": "user", "content": [{"type": "image_url"}]}],
     [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}],
     [{"role": "user", "content": [{"type": "image", "image": "red.png"}]}]],
)  # fmt: skip
def test_messages_of_another_form_are_told(reader: RequestReader, messages: Any) -> None:
    with pytest.raises(ValueError, match="messages"):
        read(reader, messages=messages)


def test_a_line_that_could_not_be_read_says_why(reader: RequestReader) -> None:
    with pytest.raises(ValueError, match="^the line is not JSON$"):
        reader.read(Line(1, 1, {}, "the line is not JSON"))


def test_what_nobody_foresaw_is_the_lines_error_and_not_told_in_a_librarys_words() -> None:
    with pytest.raises(ValueError, match=r"^the line could not be prepared \(KeyError\)$"), line_faults(1):
        raise KeyError("secret")


def test_what_is_known_is_told_as_it_is() -> None:
    for error in (ValueError("wrong"), ExecutorError("step", "rank 0 died")):
        with pytest.raises(type(error)) as caught, line_faults(1):
            raise error
        assert caught.value is error


def output(*answers: CompletionOutput, **fields: Any) -> RequestOutput:
    return RequestOutput("0", "p", [1, 2, 3], list(answers), finished=True, **fields)


def test_an_answer_is_told_flat_and_several_in_a_list() -> None:
    one = CompletionOutput(0, "a", [5, 6], cumulative_logprob=-3.0, finish_reason="length")
    two = CompletionOutput(1, "b", [7], finish_reason="stop", stop_reason="end")
    plain = {"text": "a", "token_ids": [5, 6], "finish_reason": "length", "stop_reason": None}
    assert answer_of(output(one)) == plain | {"usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}
    assert answer_of(output(one, two)) == {
        "outputs": [plain, {"text": "b", "token_ids": [7], "finish_reason": "stop", "stop_reason": "end"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6},
    }


def test_log_probabilities_are_told_where_asked_for() -> None:
    told = {5: Logprob(-0.5, 1, "a"), 6: Logprob(-2.0, 2, "b")}
    one = CompletionOutput(0, "a", [5], cumulative_logprob=-0.5, logprobs=[told], finish_reason="length")
    answer = answer_of(output(one, prompt_logprobs=[None, told, told]))
    plain = {
        5: {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
        6: {"logprob": -2.0, "rank": 2, "decoded_token": "b"},
    }
    assert answer["logprobs"] == [plain]
    assert answer["cumulative_logprob"] == -0.5
    assert answer["prompt_logprobs"] == [None, plain, plain]


def test_a_failed_request_is_its_error() -> None:
    failed = CompletionOutput(0, "", [], finish_reason="error", stop_reason="no room")
    assert answer_of(output(failed, error="no room")) == {"error": "no room"}
