"""POST /tokenize and /detokenize, against the tokenizer itself."""

from __future__ import annotations

import httpx

from dist_vlm.engine.chat import ChatOptions
from dist_vlm.engine.chat_content import parse_messages

from .live import Live


def test_a_prompt_and_back(live: Live) -> None:
    tokenizer = live.llm.get_tokenizer()
    for adds in (True, False):
        answer = httpx.post(f"{live.url}/tokenize", json={"prompt": "hello world", "add_special_tokens": adds}).json()
        assert answer["tokens"] == tokenizer.encode("hello world", add_special_tokens=adds)
        assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 512
    back = httpx.post(f"{live.url}/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"prompt": tokenizer.decode(answer["tokens"])}


def test_messages_have_a_placeholder_for_each_picture_which_is_not_fetched(live: Live) -> None:
    picture = {"type": "image_url", "image_url": {"url": "http://example.invalid/a.png"}}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "<image>?"}, picture]}]
    answer = httpx.post(f"{live.url}/tokenize", json={"messages": messages}).json()
    conversation = parse_messages(messages, fetches=True)
    assert answer["tokens"] == live.llm.front.chat.render_text(conversation, ChatOptions())[1]
    assert answer["tokens"].count(live.llm.front.spec.image_token_id) == 2


def test_what_is_wrong_is_named(live: Live) -> None:
    for body, words in (
        ({}, "exactly one"),
        ({"prompt": "a", "messages": []}, "exactly one"),
        ({"prompt": 5}, "prompt = 5"),
        ({"prompt": "a", "model": "other"}, "model = 'other'"),
    ):
        answer = httpx.post(f"{live.url}/tokenize", json=body)
        assert answer.status_code in (400, 404) and words in answer.json()["error"]["message"]
    for tokens in ([-1], [10**9], ["a"]):
        answer = httpx.post(f"{live.url}/detokenize", json={"tokens": tokens})
        assert answer.status_code == 400 and "tokens" in answer.json()["error"]["message"]
