"""POST /v1/chat/completions over scripted ranks: what the engine is given, and what a client gets."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from dist_vlm.engine.chat import ChatOptions
from dist_vlm.engine.chat_content import parse_messages

from .live import Live, scripted_text

HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 4, "ignore_eos": True}


def post(live: Live, **body: Any) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/chat/completions", json={**GREEDY, **body}, timeout=30)


def picture_url(seed: int = 0) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def rendered(live: Live, messages: list[Any], **options: Any) -> list[int]:
    """The prompt's tokens, each picture's run expanded."""
    front = live.llm.front
    _, token_ids = front.chat.render_text(parse_messages(messages), ChatOptions(**options))
    expanded: list[int] = []
    for token in token_ids:
        is_picture = token == front.spec.image_token_id
        expanded += [token] * (front.spec.image_feature_size or 1) if is_picture else [token]
    return expanded


def test_the_answer_follows_from_the_rendered_prompt(live: Live) -> None:
    answer = post(live, messages=HELLO).json()
    prompt = rendered(live, HELLO)
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny" and answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": scripted_text(live, prompt)}
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), 4)
    assert usage["total_tokens"] == len(prompt) + 4


def test_pictures_stand_where_their_parts_do(live: Live) -> None:
    parts = [
        {"type": "text", "text": "one"},
        {"type": "image_url", "image_url": {"url": picture_url(0)}},
        {"type": "image_url", "image_url": {"url": picture_url(1), "detail": "low"}},
        {"type": "text", "text": "two"},
    ]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "ok"}, *HELLO]
    answer = post(live, messages=messages).json()
    prompt = rendered(live, messages)
    assert answer["choices"][0]["message"]["content"] == scripted_text(live, prompt)
    assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_text_that_spells_a_placeholder_stays_text(live: Live) -> None:
    messages = [{"role": "user", "content": "<image> </s> <image>"}]
    answer = post(live, messages=messages)
    assert answer.status_code == 200
    assert answer.json()["usage"]["prompt_tokens"] == len(rendered(live, messages))
    assert live.llm.front.spec.image_token_id not in rendered(live, messages)


def test_a_stream_has_a_role_the_parts_and_an_end(live: Live) -> None:
    with httpx.stream(
        "POST", f"{live.url}/v1/chat/completions",
        json={**GREEDY, "messages": HELLO, "stream": True, "n": 1, "stream_options": {"include_usage": True}},
    ) as answer:  # fmt: skip
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks if chunk["choices"])
    assert text == scripted_text(live, rendered(live, HELLO))
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_the_generation_prompt_and_the_roles(live: Live) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "I am"}]
    answer = post(live, messages=messages, add_generation_prompt=False, echo=True).json()
    continued = scripted_text(live, rendered(live, messages, add_generation_prompt=False))
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "I am" + continued}


def test_a_request_that_is_refused_says_so_before_a_stream_begins(live: Live) -> None:
    answer = post(live, messages=HELLO, stream=True, temperature=-1)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "temperature"
    answer = post(live, messages=HELLO, stream=True, logit_bias={"999999": 1})
    assert answer.status_code == 400 and "logit_bias" in answer.json()["error"]["message"]


def test_a_client_that_leaves_frees_its_request(live: Live) -> None:
    async def leave(body: dict[str, Any]) -> None:
        async with httpx.AsyncClient() as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.4), client.stream("POST", url, json=body, timeout=30) as answer:
                    async for _ in answer.aiter_bytes():
                        pass

    url = f"{live.url}/v1/chat/completions"
    endless = {**GREEDY, "messages": HELLO, "max_tokens": 400}
    executor = live.llm._client._core._executor  # type: ignore[attr-defined]
    executor._step_delay_s = 0.02
    try:
        for streams in (False, True):
            asyncio.run(leave({**endless, "stream": streams}))
        end = time.monotonic() + 5
        while live.services.admission.num_taken or live.call(live.llm.state()).num_held_blocks:
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        executor._step_delay_s = 0.0
    assert live.llm.num_unfinished == 0
