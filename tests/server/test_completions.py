"""POST /v1/completions over scripted ranks."""

from __future__ import annotations

import json
from typing import Any

import httpx

from .live import Live, scripted_text

GREEDY = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}


def post(live: Live, **body: Any) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/completions", json={**GREEDY, **body}, timeout=30)


def test_one_prompt_in_text_or_in_tokens(live: Live) -> None:
    token_ids = live.llm.get_tokenizer().encode("a b c")
    expected = scripted_text(live, token_ids)
    for prompt in ("a b c", token_ids):
        answer = post(live, prompt=prompt).json()
        assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
        (choice,) = answer["choices"]
        assert (choice["index"], choice["text"], choice["finish_reason"]) == (0, expected, "length")
        assert answer["usage"]["prompt_tokens"] == len(token_ids)
    default = httpx.post(f"{live.url}/v1/completions", json={"prompt": "a b c", "temperature": 0, "ignore_eos": True})
    assert default.json()["usage"]["completion_tokens"] == 16


def test_several_prompts_are_numbered_through(live: Live) -> None:
    prompts = ["one", "two three", "four"]
    answer = post(live, prompt=prompts).json()
    tokenizer = live.llm.get_tokenizer()
    expected = [scripted_text(live, tokenizer.encode(prompt)) for prompt in prompts]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 12
    two = post(live, prompt=prompts[:2], n=2, temperature=1, seed=3).json()
    assert [choice["index"] for choice in two["choices"]] == [0, 1, 2, 3]


def test_a_stream_of_several_prompts_adds_up_to_the_whole_answer(live: Live) -> None:
    body = {**GREEDY, "prompt": ["one", "two three"], "echo": True}
    whole = httpx.post(f"{live.url}/v1/completions", json=body).json()
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    text = httpx.post(f"{live.url}/v1/completions", json=body | streamed).text
    lines = [line[6:] for line in text.split("\n\n") if line]
    chunks = [json.loads(line) for line in lines[:-1]]
    texts = {0: "", 1: ""}
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert [texts[0], texts[1]] == [choice["text"] for choice in whole["choices"]]
    assert texts[0].startswith("one") and texts[1].startswith("two three")
    assert chunks[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert lines[-1] == "[DONE]"


def test_one_prompt_that_is_refused_refuses_them_all(live: Live) -> None:
    answer = post(live, prompt=["good", "too long " * 600])
    assert answer.status_code == 400 and "at most 511" in answer.json()["error"]["message"]
    assert live.services.admission.num_taken == 0
