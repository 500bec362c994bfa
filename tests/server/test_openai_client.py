"""The official client against a server on the shipped checkpoint: its answers are right, and those of `LLM.chat`."""

from __future__ import annotations

import asyncio
import base64
import http.server
import json
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from dist_vlm import LLM, SamplingParams
from dist_vlm.async_llm import AsyncLLM
from dist_vlm.config import EngineConfig, resolve
from dist_vlm.config_environment import resolved_server
from dist_vlm.config_server import ServerConfig

from .live import Live, serving

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
PICTURES = DEMO / "pictures"
SAMPLES: list[dict[str, Any]] = json.loads((PICTURES / "questions.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def config() -> EngineConfig:
    fields = {"model": str(DEMO / "checkpoint"), "dtype": "float32", "device": "cpu", "executor": "inline"}
    return resolve(EngineConfig.from_fields(**fields, max_model_len=1024, max_num_seqs=8, kv_cache_memory_gib=0.05))


@pytest.fixture(scope="module")
def demo(config: EngineConfig) -> Iterator[Live]:
    server = ServerConfig(
        served_model_name="demo", allowed_media_networks=("127.0.0.0/8",), image_fetch_timeout_s=0.5, media_workers=1
    )
    llm = AsyncLLM.from_config(config)
    try:
        with serving(llm, resolved_server(server, config, {})) as live:
            yield live
    finally:
        llm.shutdown()


@pytest.fixture(scope="module")
def llm(config: EngineConfig) -> Iterator[LLM]:
    with LLM.from_config(config) as llm:
        yield llm


@pytest.fixture
def client(demo: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def picture_host() -> Iterator[str]:
    """Serves the sample pictures; /slow/... takes longer than the server waits."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/slow/"):
                time.sleep(1.0)
            data = (PICTURES / self.path.rsplit("/", 1)[-1]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def data_url(name: str) -> str:
    return "data:image/png;base64," + base64.b64encode((PICTURES / name).read_bytes()).decode()


def question(sample: dict[str, Any], url: str) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": sample["question"]}]
    return [{"role": "user", "content": parts}]


def asked(client: openai.OpenAI, messages: list[Any], **options: Any) -> Any:
    return client.chat.completions.create(model="demo", messages=messages, temperature=0, **options)


def expected(llm: LLM, messages: list[Any], **options: Any) -> str:
    (output,) = llm.chat(messages, SamplingParams(**{"temperature": 0, "max_tokens": None, **options}), use_tqdm=False)
    return output.outputs[0].text


@pytest.mark.parametrize("sample", SAMPLES, ids=[sample["image"] for sample in SAMPLES])
def test_pictures_by_data_url_and_by_http_are_answered_rightly(
    client: openai.OpenAI, llm: LLM, picture_host: str, sample: dict[str, Any]
) -> None:
    by_data = asked(client, question(sample, data_url(sample["image"])))
    by_http = asked(client, question(sample, f"{picture_host}/{sample['image']}"))
    text = by_data.choices[0].message.content
    assert text.strip() == sample["answer"]
    assert text == by_http.choices[0].message.content == expected(llm, question(sample, data_url(sample["image"])))
    assert by_data.choices[0].finish_reason == "stop"


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    messages = question(SAMPLES[0], data_url(SAMPLES[0]["image"]))
    whole = asked(client, messages)
    chunks = list(asked(client, messages, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert ends[-1] == "stop" and not any(ends[:-1])
    *others, last = chunks
    assert all(chunk.usage is None for chunk in others) and not last.choices
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(last.usage, name) == getattr(whole.usage, name)


def test_asynchronous_clients_stream_at_once(demo: Live) -> None:
    async def one(client: openai.AsyncOpenAI, sample: dict[str, Any]) -> str:
        messages: Any = question(sample, data_url(sample["image"]))
        stream = await client.chat.completions.create(model="demo", messages=messages, temperature=0, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="EMPTY", max_retries=0) as client:
            return await asyncio.gather(*(one(client, sample) for sample in SAMPLES))

    assert [text.strip() for text in asyncio.run(all_of_them())] == [sample["answer"] for sample in SAMPLES]


def test_several_pictures_in_several_turns(client: openai.OpenAI, llm: LLM) -> None:
    first, second = SAMPLES[0], SAMPLES[1]
    messages = [
        *question(first, data_url(first["image"])),
        {"role": "assistant", "content": first["answer"]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "and now"},
                {"type": "image_url", "image_url": {"url": data_url(second["image"]), "detail": "high"}},
                {"type": "image_url", "image_url": {"url": data_url(first["image"])}},
                {"type": "text", "text": second["question"]},
            ],
        },
    ]
    answer = asked(client, messages, max_tokens=24)
    assert answer.choices[0].message.content == expected(llm, messages, max_tokens=24)
    size = 81
    assert answer.usage.prompt_tokens > 3 * size


def test_answers_seeds_stops_and_lengths(client: openai.OpenAI, llm: LLM) -> None:
    sample = next(sample for sample in SAMPLES if len(sample["answer"].split()) > 4)
    messages = question(sample, data_url(sample["image"]))
    options = {"model": "demo", "messages": messages, "temperature": 1.5, "max_tokens": 12}
    twice = [client.chat.completions.create(**options, n=2, seed=7) for _ in range(2)]
    texts = [[choice.message.content for choice in answer.choices] for answer in twice]
    assert texts[0] == texts[1] and [choice.index for choice in twice[0].choices] == [0, 1]
    params = SamplingParams(n=2, seed=7, temperature=1.5, max_tokens=12)
    (output,) = llm.chat(messages, params, use_tqdm=False)
    assert texts[0] == [answer.text for answer in output.outputs]
    whole = asked(client, messages).choices[0].message.content
    word = whole.split()[2]
    stopped = asked(client, messages, stop=[word])
    assert stopped.choices[0].message.content == whole[: whole.index(word)]
    assert stopped.choices[0].finish_reason == "stop" and stopped.choices[0].stop_reason == word
    cut = asked(client, messages, max_completion_tokens=2)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 2


def test_log_probabilities(client: openai.OpenAI, llm: LLM) -> None:
    sample = SAMPLES[0]
    messages = question(sample, data_url(sample["image"]))
    answer = asked(client, messages, logprobs=True, top_logprobs=3, max_tokens=4)
    (output,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=4, logprobs=3), use_tqdm=False)
    entries = answer.choices[0].logprobs.content
    known = output.outputs[0]
    assert len(entries) == len(known.token_ids)
    for entry, token, theirs in zip(entries, known.token_ids, known.logprobs, strict=True):
        assert entry.logprob == pytest.approx(theirs[token].logprob, abs=1e-4)
        assert entry.token == theirs[token].decoded_token
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
        top = [one.logprob for one in entry.top_logprobs]
        assert len(top) == 3 and top == sorted(top, reverse=True) and top[0] == pytest.approx(entry.logprob, abs=1e-6)


def test_a_bias_decides_and_a_text_completion_answers(client: openai.OpenAI, llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    token = tokenizer.encode(" red", add_special_tokens=False)[-1]
    biased = asked(client, [{"role": "user", "content": "hello"}], logit_bias={str(token): 100}, max_tokens=3)
    assert biased.choices[0].message.content.strip() == tokenizer.decode([token] * 3).strip()
    prompts = ["USER: what is this? ASSISTANT:", "USER: how many shapes? ASSISTANT:"]
    completion = client.completions.create(model="demo", prompt=prompts, temperature=0, max_tokens=5, echo=True)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
    assert [choice.text for choice in completion.choices] == [
        prompt + output.outputs[0].text for prompt, output in zip(prompts, outputs, strict=True)
    ]


def test_a_slow_picture_server_is_a_timeout_in_words(client: openai.OpenAI, picture_host: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        asked(client, question(SAMPLES[0], f"{picture_host}/slow/{SAMPLES[0]['image']}"))
    assert caught.value.status_code == 422 and caught.value.code == "image_timeout"
    assert "time" in caught.value.message and "0.5 s" in caught.value.message


def test_a_picture_is_seen_as_people_see_it(client: openai.OpenAI) -> None:
    """Turned by its EXIF, and with transparency where the drawing is: the answer is that of the plain picture."""
    sample = SAMPLES[0]
    picture = Image.open(PICTURES / sample["image"]).convert("RGB")
    turned, file = picture.rotate(90, expand=True), BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    turned.save(file, "PNG", exif=exif)
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    assert asked(client, question(sample, url)).choices[0].message.content.strip() == sample["answer"]
