from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dist_vlm import SamplingParams
from dist_vlm.config import EngineConfig, resolve
from dist_vlm.engine.front import load_chat, load_tokenizer
from dist_vlm.launch.jsonl import Line
from dist_vlm.launch.jsonl_request import RequestMaker, answer_of
from dist_vlm.launch.local_media import LocalMedia
from dist_vlm.outputs import CompletionOutput, Logprob, RequestOutput

from .test_local_media import data_url


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("media")
    Image.new("RGB", (8, 6), (255, 0, 0)).save(root / "red.png")
    (root / "text.png").write_text("not a picture")
    return root


@pytest.fixture(scope="module")
def maker(tiny_facts: Path, root: Path) -> RequestMaker:
    config = resolve(EngineConfig.from_fields(model=str(tiny_facts), device="cpu", max_images_per_prompt=2))
    return RequestMaker(
        chat=load_chat(config, load_tokenizer(str(tiny_facts))),
        vision=config.vision,
        media=LocalMedia(root, max_pixels=1000),
        defaults=SamplingParams(temperature=0.5, max_tokens=128, seed=3),
    )


def make(maker: RequestMaker, **values: Any) -> tuple[Any, SamplingParams]:
    return maker.make(Line(1, 1, values))


def test_a_bare_prompt_is_sampled_as_the_flags_say(maker: RequestMaker) -> None:
    assert make(maker, prompt="what?") == ({"prompt": "what?"}, SamplingParams(temperature=0.5, max_tokens=128, seed=3))


def test_a_lines_own_sampling_comes_first(maker: RequestMaker) -> None:
    given: dict[str, Any] = {"n": 3, "stop": "x", "max_tokens": None, "seed": 9, "top_p": 0.5, "logprobs": 2}
    _, params = make(maker, prompt="what?", **given, logit_bias={"17": -5})
    assert params == SamplingParams(temperature=0.5, **given, logit_bias={17: -5})
    assert params.best_of == 3


def test_pictures_are_opened_and_placed(maker: RequestMaker) -> None:
    inputs, _ = make(maker, prompt="what?", images=["red.png", data_url(Image.new("RGB", (3, 4)))])
    assert inputs["prompt"] == "USER: <image>\n<image>\nwhat? ASSISTANT:"
    assert [one.size for one in inputs["multi_modal_data"]["image"]] == [(8, 6), (3, 4)]


def test_a_conversation_with_files_and_data_urls(maker: RequestMaker) -> None:
    messages = [
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "red.png"}},
            {"type": "text", "text": "what?"},
        ]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [
            {"type": "text", "text": "and <image> now?"},
            {"type": "image_url", "image_url": {"url": data_url(Image.new("RGB", (3, 4)))}},
        ]},
    ]  # fmt: skip
    inputs, params = make(maker, messages=messages, max_tokens=5)
    assert params.max_tokens == 5
    assert inputs["prompt"] == "USER: <image>\nwhat? ASSISTANT: red USER: <image>\nand <image> now? ASSISTANT:"
    # What is typed in a text is no place of a picture.
    assert inputs["prompt_token_ids"].count(32000) == 2
    assert [one.size for one in inputs["multi_modal_data"]["image"]] == [(8, 6), (3, 4)]


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
        ({"prompt": "a", "images": ["absent.png"]}, "'absent.png': there is no such file"),
        ({"prompt": "a", "images": ["text.png"]}, "text.png: not a picture"),
        ({"prompt": "a", "images": ["../red.png"]}, "leads out of"),
        ({"prompt": "a", "images": ["absent.png"] * 3}, "the line has 3 pictures; at most 2 are allowed"),
        ({"prompt": "a", "messages": []}, "prompt and messages are both given"),
        ({"images": ["red.png"], "messages": []}, "images and messages are both given"),
        ({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "../red.png"}}]}]}, "leads out of"),
        ({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]}]}, "URLs are not fetched"),
        ({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "red.png"}}] * 3}]}, "the line has 3 pictures"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_told_by_name(maker: RequestMaker, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(maker, **values)


@pytest.mark.parametrize(
    "messages",
    ["text", 5, [5], [{"role": "user"}, {"role": "user", "content": 5}], [{"role": "user", "content": [5]}],
     [{"role": "user", "content": [{"type": "image_url"}]}],
     [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}],
     [{"role": "user", "content": [{"type": "image", "image": "red.png"}]}]],
)  # fmt: skip
def test_messages_of_another_form_are_told_when_they_are_read(maker: RequestMaker, messages: Any) -> None:
    with pytest.raises(ValueError, match="messages"):
        make(maker, messages=messages)[0]["prompt"]


def test_a_line_that_could_not_be_read_says_why(maker: RequestMaker) -> None:
    with pytest.raises(ValueError, match="^the line is not JSON$"):
        maker.make(Line(1, 1, {}, "the line is not JSON"))


def test_what_nobody_foresaw_is_the_lines_error_and_not_told_in_a_librarys_words(
    maker: RequestMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(maker._media, "load", fail)
    with pytest.raises(ValueError, match=r"^the line could not be prepared \(KeyError\)$"):
        make(maker, prompt="a", images=["red.png"])


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
