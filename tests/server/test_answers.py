"""Parts of answers, and log probabilities against examples written by hand in OpenAI's two forms."""

from __future__ import annotations

import json
import math
import random

import pytest
from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.completion_choice import Logprobs

from dist_vlm.outputs import CompletionOutput, Logprob, RequestOutput
from dist_vlm.server.answers import Delta, Deltas, as_delta, chat_logprobs, completion_logprobs, usage


def output(*answers: CompletionOutput, prompt: int = 3, cached: int = 0) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        prompt="p",
        prompt_token_ids=[0] * prompt,
        outputs=list(answers),
        finished=all(answer.finished() for answer in answers),
        num_cached_tokens=cached,
    )


def answer(index: int, text: str, tokens: list[int], reason: str | None = None) -> CompletionOutput:
    return CompletionOutput(index=index, text=text, token_ids=tokens, finish_reason=reason)


def parts(deltas: Deltas, *answers: CompletionOutput) -> list[tuple[int, str, list[int], str | None]]:
    return [(one.index, one.text, list(one.token_ids), one.finish_reason) for one in deltas.of(output(*answers))]


# -------------------------------------------------------------------- deltas


def test_a_delta_is_what_came_since_the_last_one() -> None:
    deltas = Deltas()
    assert parts(deltas, answer(0, "", [])) == []
    assert parts(deltas, answer(0, "He", [1])) == [(0, "He", [1], None)]
    assert parts(deltas, answer(0, "He", [1])) == [], "nothing new is nothing"
    assert parts(deltas, answer(0, "He", [1, 2])) == [(0, "", [2], None)], "half a character"
    assert parts(deltas, answer(0, "Hello", [1, 2, 3])) == [(0, "llo", [3], None)]
    assert parts(deltas, answer(0, "Hello", [1, 2, 3, 4], "stop")) == [(0, "", [4], "stop")]
    assert parts(deltas, answer(0, "Hello", [1, 2, 3, 4], "stop")) == [], "an end is told once"


def test_the_end_is_told_where_nothing_else_is_new() -> None:
    deltas = Deltas()
    assert parts(deltas, answer(0, "a", [1])) == [(0, "a", [1], None)]
    assert parts(deltas, answer(0, "a", [1], "abort")) == [(0, "", [], "abort")]
    assert parts(Deltas(), answer(0, "", [], "length")) == [(0, "", [], "length")]


def test_several_answers_are_told_apart() -> None:
    deltas = Deltas()
    assert parts(deltas, answer(0, "a", [1]), answer(1, "", [])) == [(0, "a", [1], None)]
    assert parts(deltas, answer(0, "a", [1], "stop"), answer(1, "xy", [7])) == [
        (0, "", [], "stop"),
        (1, "xy", [7], None),
    ]
    assert parts(deltas, answer(0, "a", [1], "stop"), answer(1, "xyz", [7, 8], "length")) == [(1, "z", [8], "length")]


def test_the_reason_and_log_probabilities_come_with_their_tokens() -> None:
    deltas = Deltas()
    entries = [{token: Logprob(-token, 1, str(token))} for token in range(4)]
    grown = answer(0, "01", [0, 1])
    grown.logprobs = entries[:2]
    (first,) = deltas.of(output(grown))
    assert (first.logprobs, first.stop_reason) == (entries[:2], None)
    ended = answer(0, "01", [0, 1, 2, 3], "stop")
    ended.logprobs, ended.stop_reason = entries, "23"
    (second,) = deltas.of(output(ended))
    assert (second.logprobs, second.stop_reason, list(second.token_ids)) == (entries[2:], "23", [2, 3])


@pytest.mark.parametrize("seed", range(5))
def test_deltas_add_up_to_the_answer(seed: int) -> None:
    chance = random.Random(seed)
    whole = [("".join(chance.choices("abc", k=20)), chance.choices(range(9), k=15)) for _ in range(3)]
    deltas, came = Deltas(), [("", list[int]()) for _ in whole]
    ends = [0] * 3
    for step in range(21):
        grown = [
            answer(index, text[:step], tokens[: min(step, 15)], "stop" if step == 20 else None)
            for index, (text, tokens) in enumerate(whole)
        ]
        if chance.random() < 0.3 and step < 20:
            continue  # a slow client sees several steps at once
        for index, text, tokens, reason in parts(deltas, *grown):
            came[index] = came[index][0] + text, came[index][1] + tokens
            ends[index] += reason is not None
    assert came == whole
    assert ends == [1, 1, 1]


def test_a_finished_answer_is_one_delta() -> None:
    ended = answer(2, "abc", [1, 2], "stop")
    ended.stop_reason, ended.logprobs = 7, [{1: Logprob(-1.0)}, {2: Logprob(-2.0)}]
    assert as_delta(ended) == Delta(2, "abc", [1, 2], ended.logprobs, "stop", 7)


def test_usage_counts_all_prompts_and_all_answers() -> None:
    one = output(answer(0, "", [1, 2], "stop"), answer(1, "", [1], "stop"), prompt=10, cached=8)
    two = output(answer(0, "", [1] * 5, "length"), prompt=4)
    assert usage([one, two]) == {
        "prompt_tokens": 14,
        "completion_tokens": 8,
        "total_tokens": 22,
        "prompt_tokens_details": {"cached_tokens": 8},
    }


# ---------------------------------------------------------- log probabilities


def delta(tokens: list[int], logprobs: list[dict[int, Logprob]] | None) -> Delta:
    return Delta(0, "", tokens, logprobs, None, None)


# "Hello!", the second token not the likeliest, as the engine tells it: the token first, then the likeliest.
HELLO = [
    {9906: Logprob(-0.25, 1, "Hello"), 13347: Logprob(-1.75, 2, "Hi"), 19182: Logprob(-5.5, 3, "Hey")},
    {0: Logprob(-3.5, 3, "!"), 1070: Logprob(-0.125, 1, " there"), 11: Logprob(-2.5, 2, ",")},
]


def test_a_chat_has_openais_form() -> None:
    assert chat_logprobs(delta([9906, 0], HELLO), 2) == {
        "content": [
            {
                "token": "Hello",
                "logprob": -0.25,
                "bytes": [72, 101, 108, 108, 111],
                "top_logprobs": [
                    {"token": "Hello", "logprob": -0.25, "bytes": [72, 101, 108, 108, 111]},
                    {"token": "Hi", "logprob": -1.75, "bytes": [72, 105]},
                ],
            },
            {
                "token": "!",
                "logprob": -3.5,
                "bytes": [33],
                "top_logprobs": [
                    {"token": " there", "logprob": -0.125, "bytes": [32, 116, 104, 101, 114, 101]},
                    {"token": ",", "logprob": -2.5, "bytes": [44]},
                ],
            },
        ]
    }


def test_a_chat_without_alternatives_has_the_tokens_alone() -> None:
    told = chat_logprobs(delta([9906, 0], HELLO), 0)
    assert told is not None
    assert [(one["token"], one["top_logprobs"]) for one in told["content"]] == [("Hello", []), ("!", [])]


def test_a_chat_that_asked_for_none_has_none() -> None:
    assert chat_logprobs(delta([1, 2], None), 0) is None


def test_a_delta_without_tokens_has_an_empty_list() -> None:
    assert chat_logprobs(delta([], []), 3) == {"content": []}


def test_bytes_are_those_of_the_text_unless_it_is_half_a_character() -> None:
    entries = [{1: Logprob(-1.0, 1, "é図")}, {2: Logprob(-1.0, 1, "\ufffd")}, {3: Logprob(-1.0, 1, None)}]
    told = chat_logprobs(delta([1, 2, 3], entries), 0)
    assert told is not None
    assert [one["bytes"] for one in told["content"]] == [list("é図".encode()), None, []]


def test_a_completion_has_openais_form() -> None:
    told = completion_logprobs([(9906, "Hello"), (0, "!")], HELLO, num_alternatives=2, offset=7)
    assert told == {
        "tokens": ["Hello", "!"],
        "token_logprobs": [-0.25, -3.5],
        # With the token itself where it is none of the likeliest, so that there may be one more.
        "top_logprobs": [{"Hello": -0.25, "Hi": -1.75}, {" there": -0.125, ",": -2.5, "!": -3.5}],
        "text_offset": [7, 12],
    }
    assert [list(one) for one in told["top_logprobs"]] == [["Hello", "Hi"], [" there", ",", "!"]]


def test_a_completion_without_alternatives_has_the_tokens_own() -> None:
    told = completion_logprobs([(9906, "Hello"), (0, "!")], HELLO, num_alternatives=0, offset=0)
    assert told["top_logprobs"] == [{"Hello": -0.25}, {"!": -3.5}]


def test_a_prompts_first_token_has_nothing_before_it() -> None:
    entries = [None, {5: Logprob(-0.5, 1, "b"), 6: Logprob(-0.75, 2, "c")}]
    assert completion_logprobs([(4, "<s>"), (5, "b")], entries, num_alternatives=2, offset=0) == {
        "tokens": ["<s>", "b"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": [None, {"b": -0.5, "c": -0.75}],
        "text_offset": [0, 3],
    }


def test_two_tokens_of_one_text_count_as_the_likelier() -> None:
    entries = [{2: Logprob(-1.5, 2, "\ufffd"), 1: Logprob(-0.5, 1, "\ufffd"), 3: Logprob(-2.0, 3, "c")}]
    told = completion_logprobs([(2, "\ufffd")], entries, num_alternatives=3, offset=0)
    assert told["top_logprobs"] == [{"\ufffd": -0.5, "c": -2.0}]
    assert told["token_logprobs"] == [-1.5]


def test_equally_likely_tokens_come_in_the_order_of_their_ids() -> None:
    entries = [{9: Logprob(-1.0, 1, "i"), 3: Logprob(-1.0, 1, "c"), 5: Logprob(-1.0, 1, "e")}]
    told = chat_logprobs(delta([9], entries), 2)
    assert told is not None
    assert [one["token"] for one in told["content"][0]["top_logprobs"]] == ["c", "e"]


@pytest.mark.parametrize("value", [-math.inf, -1e30, math.nan])
def test_what_json_cannot_say_is_openais_smallest(value: float) -> None:
    entries = [{1: Logprob(value, 9, "a"), 2: Logprob(-0.5, 1, "b")}]
    chat = chat_logprobs(delta([1], entries), 2)
    completion = completion_logprobs([(1, "a")], entries, num_alternatives=2, offset=0)
    assert chat is not None
    assert chat["content"][0]["logprob"] == -9999.0
    assert completion["token_logprobs"] == [-9999.0]
    assert completion["top_logprobs"][0]["a"] == -9999.0
    json.dumps([chat, completion], allow_nan=False)


def test_the_official_client_reads_both() -> None:
    chat = chat_logprobs(delta([9906, 0], HELLO), 2)
    read = ChoiceLogprobs.model_validate(chat)
    assert read.content is not None
    assert [entry.token for entry in read.content] == ["Hello", "!"]
    assert read.content[1].top_logprobs[0].logprob == -0.125
    told = completion_logprobs([(9906, "Hello"), (0, "!")], [None, HELLO[1]], num_alternatives=2, offset=0)
    legacy = Logprobs.model_construct(**told)
    assert legacy.tokens == ["Hello", "!"]
    assert told.keys() == Logprobs.model_fields.keys()
