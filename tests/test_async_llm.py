"""The asynchronous API: many clients at once, each with its own stream, whatever the others and the engine do."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import io
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_vlm import LLM, AsyncLLM, SamplingParams
from dist_vlm.config import ConfigError, EngineConfig
from dist_vlm.engine.front import Front, load_front
from dist_vlm.executor.base import ExecutorError
from dist_vlm.executor.fake import FakeExecutor, checksum_token
from dist_vlm.multimodal.image import ImagePixelData
from dist_vlm.outputs import RequestOutput

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
NOTICE_S = 2.0

Make = Callable[..., AsyncLLM]


def with_image(seed: int = 0, prompt: str = "USER: <image>\nWhat? ASSISTANT:") -> dict[str, Any]:
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    return {"prompt": prompt, "multi_modal_data": ImagePixelData(picture)}


def scripted(output: RequestOutput, count: int) -> list[int]:
    tokens = list(output.prompt_token_ids)
    for _ in range(count):
        tokens.append(checksum_token(tokens, len(tokens)))
    return tokens[len(output.prompt_token_ids) :]


def tokens_of(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


async def whole(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
    """A stream's last output; the ones before it must lead to it, and it alone is finished."""
    seen: list[RequestOutput] = [output async for output in stream]
    assert [output.finished for output in seen] == [False] * (len(seen) - 1) + [True]
    last = seen[-1]
    for output in seen:
        for answer, final in zip(output.outputs, last.outputs, strict=True):
            assert answer.token_ids == final.token_ids[: len(answer.token_ids)]
            assert final.text.startswith(answer.text)
    counts = [sum(len(answer.token_ids) for answer in output.outputs) for output in seen]
    assert counts == sorted(counts)
    return last


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        await asyncio.sleep(0.005)


_load_once = functools.cache(load_front)


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a tokenizer takes longer than most of these tests."""

    def load(config: EngineConfig, *, serves_logits_processors: bool, chat_template: str | None) -> Front:
        assert chat_template is None
        return _load_once(config.replace(engine_process=False), serves_logits_processors=serves_logits_processors)

    monkeypatch.setattr("dist_vlm.async_llm.load_front", load)


def engine_threads() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if one.name == "engine-core"}


@pytest.fixture
def others() -> set[threading.Thread]:
    """Those of engines that other tests of this process keep."""
    return engine_threads()


@pytest.fixture
def config(tiny_facts: Path) -> EngineConfig:
    return EngineConfig.from_fields(
        model=str(tiny_facts), device="cpu", executor="fake", max_model_len=128, max_num_seqs=4,
        max_num_batched_tokens=32, num_gpu_blocks_override=64,
    )  # fmt: skip


@pytest.fixture
def make(config: EngineConfig) -> Iterator[Make]:
    """Builds AsyncLLMs over scripted ranks, and shuts them down."""
    made: list[AsyncLLM] = []

    def build(*, engine_process: bool = False, fields: dict[str, Any] | None = None, **script: Any) -> AsyncLLM:
        executor = None if engine_process else FakeExecutor(num_blocks=64, **script)
        changed = config.replace(engine_process=engine_process, **(fields or {}))
        made.append(AsyncLLM.from_config(changed, executor=executor))
        return made[-1]

    yield build
    for llm in made:
        llm.shutdown()


def assert_nothing_is_held(llm: AsyncLLM) -> None:
    core: Any = llm._client._core  # type: ignore[attr-defined]
    end = time.monotonic() + 5
    while core.has_work:
        assert time.monotonic() < end, "the core has work still"
        time.sleep(0.005)
    assert core.scheduler.pool.num_held == 0
    assert core.request_ids == ()
    assert llm.num_unfinished == 0
    assert not llm._streams._by_engine


# ------------------------------------------------------------------- answers


@pytest.mark.parametrize("engine_process", [False, True])
def test_streams_are_what_generate_returns(make: Make, config: EngineConfig, engine_process: bool) -> None:
    prompts = [with_image(i) if i % 3 == 0 else f"prompt number {i}" for i in range(12)]
    with LLM.from_config(config) as llm:
        expected = llm.generate(prompts, GREEDY, use_tqdm=False)
    async_llm = make(engine_process=engine_process)

    async def run() -> list[RequestOutput]:
        return await asyncio.gather(*(whole(async_llm.generate(prompt, GREEDY)) for prompt in prompts))

    outputs = asyncio.run(run())
    for output, other in zip(outputs, expected, strict=True):
        assert (output.prompt, output.prompt_token_ids) == (other.prompt, other.prompt_token_ids)
        assert (output.outputs, output.error) == (other.outputs, None)
        assert tokens_of(output) == scripted(output, 6)
        assert output.metrics is not None
        assert output.metrics.finished_time is not None


@pytest.mark.parametrize("engine_process", [False, True])
def test_the_model_answers_as_in_generate(tiny_checkpoint: Path, engine_process: bool) -> None:
    arguments: dict[str, Any] = {
        "executor": "inline", "device": "cpu", "max_model_len": 128, "max_num_seqs": 8, "num_gpu_blocks_override": 64,
        "threads_per_rank": 1,
    }  # fmt: skip
    prompts = [with_image(i) for i in range(4)] + ["text alone"]
    several = SamplingParams(n=2, best_of=3, temperature=1.0, seed=5, max_tokens=6, logprobs=2, prompt_logprobs=1)
    jobs = [(prompt, params) for prompt in prompts for params in (GREEDY, several)]
    with LLM(str(tiny_checkpoint), **arguments) as llm:
        expected = llm.generate([job[0] for job in jobs], [job[1] for job in jobs], use_tqdm=False)

    async def run() -> list[RequestOutput]:
        async with AsyncLLM(str(tiny_checkpoint), engine_process=engine_process, **arguments) as async_llm:
            return await asyncio.gather(*(whole(async_llm.generate(*job)) for job in jobs))

    outputs = asyncio.run(run())
    for output, other in zip(outputs, expected, strict=True):
        assert [(answer.token_ids, answer.text) for answer in output.outputs] == [
            (answer.token_ids, answer.text) for answer in other.outputs
        ]
        # The batches differ, and with them the last bits of the numbers.
        assert_logprobs_close([answer.logprobs for answer in output.outputs], [a.logprobs for a in other.outputs])
        assert_logprobs_close([output.prompt_logprobs], [other.prompt_logprobs])


def assert_logprobs_close(ours: list[Any], theirs: list[Any]) -> None:
    for answer, other in zip(ours, theirs, strict=True):
        assert (answer is None) == (other is None)
        for entry, expected in zip(answer or (), other or (), strict=True):
            assert (entry is None) == (expected is None)
            assert {token: one.logprob for token, one in (entry or {}).items()} == pytest.approx(
                {token: one.logprob for token, one in (expected or {}).items()}, abs=1e-5
            )


def test_a_stop_string_ends_an_answer_here_and_in_the_core(make: Make) -> None:
    llm = make(step_delay_s=0.002)

    async def run() -> tuple[RequestOutput, RequestOutput]:
        free = await whole(llm.generate("hello", LONG))
        stop = free.outputs[0].text[8:12]
        params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, stop=stop)
        return free, await whole(llm.generate("hello", params))

    free, stopped = asyncio.run(run())
    (answer,) = stopped.outputs
    stop = free.outputs[0].text[8:12]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.text == free.outputs[0].text[: free.outputs[0].text.index(stop)]
    assert_nothing_is_held(llm)
    assert asyncio.run(llm.stats()).num_scheduled_tokens < 190, "it did not run on to 100 tokens"


def test_logits_processors_are_served_where_the_rank_is_in_this_process(tiny_checkpoint: Path, make: Make) -> None:
    def only_seven(token_ids: list[int], logits: Any) -> Any:
        chosen = logits.clone().fill_(float("-inf"))
        chosen[7] = 0.0
        return chosen

    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logits_processors=[only_seven])
    for llm in (make(), make(engine_process=True)):
        with pytest.raises(ValueError, match="logits_processors"):
            asyncio.run(whole(llm.generate("hello", params)))

    async def run() -> list[RequestOutput]:
        async with AsyncLLM(
            str(tiny_checkpoint), executor="inline", device="cpu", max_model_len=128, num_gpu_blocks_override=64,
            threads_per_rank=1,
        ) as llm:  # fmt: skip
            outputs = await asyncio.gather(*(whole(llm.generate("hello", one)) for one in (params, GREEDY, params)))
            with pytest.raises(asyncio.CancelledError):
                task = asyncio.ensure_future(whole(llm.generate("hello", params)))
                await asyncio.sleep(0)
                task.cancel()
                await task
            await llm.stats()  # answered once the core has heard of the ends
            core: Any = llm._client._core  # type: ignore[attr-defined]
            await until(lambda: core._executor._worker._runner.processors == {})
            return outputs

    first, plain, last = asyncio.run(run())
    assert [tokens_of(first), tokens_of(last)] == [[7, 7, 7]] * 2
    assert tokens_of(plain) != [7] * 6


def test_one_picture_object_in_many_requests_at_once(make: Make) -> None:
    """PIL decodes a picture from a file when it is first used, whichever thread that is."""
    llm = make()
    file = io.BytesIO()
    Image.effect_noise((1200, 900), 50).convert("RGB").save(file, "JPEG")

    async def run() -> list[RequestOutput]:
        outputs = []
        for _ in range(5):
            inputs = {"prompt": "<image> what?", "multi_modal_data": {"image": Image.open(io.BytesIO(file.getvalue()))}}
            outputs += await asyncio.gather(*(whole(llm.generate(inputs, GREEDY)) for _ in range(6)))
        return outputs

    outputs = asyncio.run(run())
    assert {output.error for output in outputs} == {None}
    assert asyncio.run(llm.stats()).num_encoded_images == 1, "each of them is the same picture"


def test_requests_without_a_seed_draw_each_their_own(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make()
    seeds: list[int] = []
    add = llm._client.add
    monkeypatch.setattr(llm._client, "add", lambda one: (seeds.append(one.sampling.seed), add(one)))
    free = SamplingParams(temperature=1.0, max_tokens=1)

    async def run() -> None:
        await asyncio.gather(*(whole(llm.generate("hello", free)) for _ in range(100)))

    asyncio.run(run())
    assert len(set(seeds)) == 100


def test_two_hundred_at_once_from_two_event_loops(make: Make) -> None:
    llm = make(staging_polls=2)
    results: list[RequestOutput] = []

    async def client(name: str) -> None:
        prompt: Any = with_image(int(name[1:]) % 5) if name.endswith("0") else f"prompt {name}"
        output = await whole(llm.generate(prompt, GREEDY, request_id=name))
        assert output.request_id == name
        results.append(output)

    async def run(letter: str) -> None:
        await asyncio.gather(*(client(f"{letter}{i}") for i in range(100)))

    threads = [threading.Thread(target=lambda letter=letter: asyncio.run(run(letter))) for letter in "ab"]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 200
    assert all(tokens_of(output) == scripted(output, 6) for output in results)
    assert_nothing_is_held(llm)


def test_each_output_is_the_callers_own_and_shows_all_tokens_so_far(make: Make) -> None:
    llm = make(step_delay_s=0.002)

    async def run() -> list[RequestOutput]:
        return [output async for output in llm.generate("hello", LONG)]

    outputs = asyncio.run(run())
    final = scripted(outputs[-1], 100)
    lengths = [len(tokens_of(output)) for output in outputs]
    assert lengths == sorted(set(lengths)), "each brings something new"
    assert lengths[-1] == 100
    assert len(lengths) > 20, "it streams"
    assert all(tokens_of(output) == final[: len(tokens_of(output))] for output in outputs)


def test_a_slow_consumer_gets_merged_news(make: Make) -> None:
    llm = make(step_delay_s=0.001)

    async def run() -> list[int]:
        lengths = []
        async for output in llm.generate("hello", LONG):
            lengths.append(len(tokens_of(output)))
            await until(lambda: llm.num_unfinished == 0)
        return lengths

    lengths = asyncio.run(run())
    assert lengths[-1] == 100
    assert len(lengths) <= 2


def slow_down(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> threading.Event:
    """Preparing a prompt that begins with "slow" takes so long, or until the event is set."""
    go_on = threading.Event()
    prepare = llm._front.processor.process

    def process(request_id: str, inputs: Any, *rest: Any, **more: Any) -> Any:
        if isinstance(inputs, str) and inputs.startswith("slow"):
            go_on.wait(seconds or 10)
        return prepare(request_id, inputs, *rest, **more)

    monkeypatch.setattr(llm._front.processor, "process", process)
    return go_on


def test_parameters_are_those_of_the_call(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller may reuse the object while the request is still being prepared."""
    llm = make()
    go_on = slow_down(llm, monkeypatch)

    async def run() -> RequestOutput:
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        answer = asyncio.ensure_future(whole(llm.generate("slow", params)))
        await until(lambda: llm.num_unfinished == 1)
        params.max_tokens = 50
        go_on.set()
        return await answer

    assert len(tokens_of(asyncio.run(run()))) == 3


def test_a_slow_preparation_blocks_neither_the_event_loop_nor_other_requests(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make()
    go_on = slow_down(llm, monkeypatch)
    threads: list[str] = []
    monkeypatch.setattr(llm._client, "add", lambda one, add=llm._client.add: (threads.append(thread_name()), add(one)))

    async def run() -> float:
        slow = asyncio.ensure_future(whole(llm.generate("slow", GREEDY)))
        await until(lambda: llm.num_unfinished == 1)
        worst = 0.0
        for _ in range(20):
            began = time.monotonic()
            await asyncio.sleep(0.005)
            worst = max(worst, time.monotonic() - began)
        await whole(llm.generate("quick", GREEDY))
        assert not slow.done()
        go_on.set()
        assert tokens_of(await slow)
        return worst

    assert asyncio.run(run()) < 0.2
    assert len(threads) == 2
    assert all(name.startswith("prepare") for name in threads), "an image's bytes are not copied in the event loop"


def thread_name() -> str:
    return threading.current_thread().name


# -------------------------------------------------------------------- errors


def test_an_invalid_request_raises_at_the_first_iteration_and_queues_nothing(make: Make) -> None:
    llm = make()

    async def run() -> None:
        for inputs, params, text in (
            ("", GREEDY, "prompt is empty"),
            ("word " * 300, GREEDY, "at most 127"),
            (with_image(prompt="<image>" * 3), GREEDY, "3 image placeholders for 1 image"),
            ("hello", {"max_tokens": 3}, "sampling_params of type dict"),
        ):
            with pytest.raises(ValueError, match=text):
                await anext(llm.generate(inputs, params))  # type: ignore[arg-type]
        for request_id in ("", 7):
            with pytest.raises(ValueError, match="request_id = "):
                await anext(llm.generate("hello", GREEDY, request_id))  # type: ignore[arg-type]
        assert (await llm.stats()).num_scheduled_tokens == 0

    asyncio.run(run())
    assert_nothing_is_held(llm)


def test_an_id_in_use_is_refused_and_free_again_at_once_after_its_end(make: Make) -> None:
    llm = make(step_delay_s=0.005)

    async def run() -> None:
        first = llm.generate("hello", LONG, "mine")
        await anext(first)
        with pytest.raises(ValueError, match="'mine' is in use"):
            await anext(llm.generate("other", GREEDY, "mine"))
        numbered = await whole(llm.generate("hello", GREEDY))
        assert numbered.request_id == "0"
        for _ in range(5):
            await llm.abort("mine")
            assert (await whole(first)).outputs[0].finish_reason == "abort"
            # The core may not have heard of the end yet; its news of it must not reach the next of that name.
            first = llm.generate("hello", LONG, "mine")
            assert not (await anext(first)).finished
        await first.aclose()
        with contextlib.suppress(ValueError):
            taken = llm.generate("hello", GREEDY, "1")
            await anext(taken)
            assert (await whole(llm.generate("hello", GREEDY))).request_id == "2", "a number in use is passed over"
            await taken.aclose()

    asyncio.run(run())
    assert_nothing_is_held(llm)


def test_what_fails_in_the_engine_fails_alone_and_the_others_tokens_are_unchanged(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = make()._front.processor.process("x", with_image(99), GREEDY).requests[0].images[0].span.image
    llm = make(fail_images={key: "the image could not be encoded"})
    prepare = llm._front.processor.process

    def process(request_id: str, inputs: Any, *rest: Any, **more: Any) -> Any:
        if inputs == "spoilt":
            raise MemoryError("secret address 0x7f00")
        return prepare(request_id, inputs, *rest, **more)

    monkeypatch.setattr(llm._front.processor, "process", process)
    good = [with_image(i) if i % 2 else f"prompt {i}" for i in range(8)]

    async def run() -> list[RequestOutput]:
        jobs = [*good[:4], "spoilt", with_image(99), *good[4:]]
        return await asyncio.gather(*(whole(llm.generate(job, GREEDY)) for job in jobs))

    outputs = asyncio.run(run())
    spoilt, no_image = outputs[4:6]
    assert spoilt.error == spoilt.outputs[0].stop_reason == "the request could not be prepared (MemoryError)"
    assert no_image.error == "the image could not be encoded"
    assert {output.outputs[0].finish_reason for output in outputs[4:6]} == {"error"}
    assert "0x7f00" in caplog.text
    for output in outputs[:4] + outputs[6:]:
        assert output.error is None
        assert tokens_of(output) == scripted(output, 6)
    assert_nothing_is_held(llm)


def test_an_answer_that_cannot_be_detokenized_fails_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dist_vlm.engine.request_log import RequestLog

    llm = make()
    take = RequestLog.take

    def fail_some(self: RequestLog, news: Any) -> RequestOutput:
        output = take(self, news)
        if output.prompt == "bad" and len(tokens_of(output)) == 3:
            raise IndexError("secret address 0x7f00")
        return output

    monkeypatch.setattr(RequestLog, "take", fail_some)

    async def run() -> list[RequestOutput]:
        jobs = [("good 1", GREEDY), ("bad", LONG), ("good 2", GREEDY)]
        return await asyncio.gather(*(whole(llm.generate(*job)) for job in jobs))

    first, bad, second = asyncio.run(run())
    assert bad.error == "the answer could not be detokenized (IndexError)"
    assert bad.outputs[0].finish_reason == "error"
    assert bad.prompt == "bad"
    assert "0x7f00" in caplog.text
    for output in (first, second):
        assert tokens_of(output) == scripted(output, 6)
    assert_nothing_is_held(llm)


def test_a_request_the_core_refuses_ends_with_its_reason(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make()
    monkeypatch.setattr(llm._client._core.scheduler, "check_fits", refuse)  # type: ignore[attr-defined]

    async def run() -> RequestOutput:
        return await whole(llm.generate("hello", GREEDY))

    output = asyncio.run(run())
    assert (output.error, output.outputs[0].finish_reason) == ("it can never fit", "error")
    assert_nothing_is_held(llm)


def refuse(request: object) -> None:
    raise ValueError("it can never fit")


@pytest.mark.parametrize("engine_process", [False, True])
def test_lost_ranks_end_every_request_within_two_seconds_by_name(make: Make, engine_process: bool) -> None:
    lost = ExecutorError("step", "its process died", 1)
    llm = make(engine_process=True) if engine_process else make(fail_steps={4: lost}, step_delay_s=0.05)

    async def run() -> list[RequestOutput]:
        count = 200 if engine_process else 8
        answers = [asyncio.ensure_future(whole(llm.generate(f"prompt {i}", LONG))) for i in range(count)]
        if engine_process:
            await until(lambda: llm._client.pid is not None)  # type: ignore[attr-defined]
            await anext(llm.generate("hello", LONG))
            os.kill(llm._client.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        return await asyncio.wait_for(asyncio.gather(*answers), NOTICE_S)

    outputs = asyncio.run(run())
    # Those that had ended before, ended well.
    (error,) = {output.error for output in outputs} - {None}
    assert all(tokens_of(output) == scripted(output, 100) for output in outputs if output.error is None)
    name = "engine process failed .* was ended by signal 9" if engine_process else r"step failed \(rank 1\): .* died"
    with pytest.raises(ExecutorError, match=name):
        asyncio.run(llm.check_health())
    assert error == str(llm.dead_error)
    assert llm.errored
    assert not llm.is_running
    for call in (llm.stats, lambda: anext(llm.generate("hello", GREEDY))):
        with pytest.raises(ExecutorError, match=name):
            asyncio.run(as_coroutine(call))
    assert llm.num_unfinished == 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", ["rank", "engine"])
def test_a_process_killed_under_ray_is_named_within_two_seconds_and_none_is_left(
    tiny_checkpoint: Path, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank is replaced once, and answers are what they are of ranks that nobody killed."""
    # Short, for the paths of Ray's sockets are bounded.
    folder = Path(tempfile.mkdtemp(prefix="dv", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    llm = AsyncLLM(
        str(tiny_checkpoint), tensor_parallel_size=2, device="cpu", engine_process=True, transport="direct",
        max_model_len=128, num_gpu_blocks_override=64, threads_per_rank=1, max_restarts=1,
    )  # fmt: skip
    engine: int = llm._client.pid  # type: ignore[attr-defined]
    drawn = SamplingParams(temperature=1, seed=7, max_tokens=80, ignore_eos=True)
    inputs = [("prompt 0", LONG), ("prompt 1", drawn), (with_image(), LONG), (with_image(3), drawn)]

    async def run(kills: bool) -> tuple[list[RequestOutput], float]:
        answers = [asyncio.ensure_future(whole(llm.generate(prompt, params))) for prompt, params in inputs]
        await anext(llm.generate("hello", LONG))
        began = time.monotonic()
        if kills:
            os.kill(ranks_of(engine)[1] if victim == "rank" else engine, signal.SIGKILL)
        return await asyncio.gather(*answers), time.monotonic() - began

    try:
        if victim == "rank":
            told, _ = asyncio.run(run(kills=True))
            undisturbed, _ = asyncio.run(run(kills=False))
            assert [output.error for output in told] == [None] * 4
            assert [*map(tokens_of, told)] == [*map(tokens_of, undisturbed)]
            assert asyncio.run(llm.state()).num_restarts == 1
        outputs, seconds = asyncio.run(run(kills=True))
        (error,) = {output.error for output in outputs}
        assert error is not None
        assert seconds < NOTICE_S
        if victim == "rank":
            assert "(rank 0): its process died" in error or "(rank 1): its process died" in error
        else:
            assert f"the process {engine} was ended by signal 9" in error
    finally:
        llm.shutdown()
    end = time.monotonic() + 5
    while left := session_of(engine):
        assert time.monotonic() < end, left
        time.sleep(0.05)
    assert not list(folder.glob("dvlm-*"))
    shutil.rmtree(folder)


def ranks_of(engine: int) -> list[int]:
    """The processes of two ranks."""
    ranks = [pid for pid in session_of(engine) if b"ray::Worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 2
    return ranks


def session_of(leader: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] != "Z" and int(fields[3]) == leader:
                found.append(int(stat.parent.name))
    return found


async def as_coroutine(call: Callable[[], Awaitable[Any]]) -> Any:
    return await call()


# ---------------------------------------------------------- is it alive, what does it hold


@pytest.mark.parametrize("engine_process", [False, True])
def test_the_state_and_the_silence_of_the_ranks_are_told(make: Make, engine_process: bool) -> None:
    llm = make(engine_process=engine_process)

    async def run() -> None:
        await whole(llm.generate("hello", GREEDY))
        state = await llm.state()
        # The prompt, and the answer but for its last token, in blocks of 16; they fill none.
        output = await whole(llm.generate("hello", GREEDY))
        assert len(output.prompt_token_ids) + 5 < 16
        assert state.stats.num_scheduled_tokens == len(output.prompt_token_ids) + 5
        assert (state.num_blocks, state.num_held_blocks, state.num_cached_blocks) == (64, 0, 0)
        assert (state.num_running, state.num_waiting, state.num_staging, state.staged_bytes) == (0, 0, 0, 0)
        assert (await llm.stats()).num_scheduled_tokens == 2 * state.stats.num_scheduled_tokens
        (silence,) = await llm.silence_s()
        assert 0.0 <= silence < 1.0

    asyncio.run(run())
    assert llm.front.tokenizer is llm.get_tokenizer()


def has_stopped(pid: int) -> bool:
    """Every thread: each stops when it next gets to run."""
    states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return set(states) == {"T"}


def test_a_stopped_engine_process_holds_up_whoever_asks_it_and_nobody_else(make: Make) -> None:
    llm = make(engine_process=True)
    pid: int = llm._client.pid  # type: ignore[attr-defined]

    async def longest_pause(until_done: asyncio.Task[Any]) -> float:
        longest, last = 0.0, time.monotonic()
        while not until_done.done():
            await asyncio.sleep(0.005)
            now = time.monotonic()
            longest, last = max(longest, now - last), now
        return longest

    async def run() -> None:
        assert await llm.silence_s()
        os.kill(pid, signal.SIGSTOP)
        while not has_stopped(pid):
            await asyncio.sleep(0.01)
        try:
            for _ in range(2):
                asking = asyncio.ensure_future(asyncio.wait_for(llm.silence_s(), 0.3))
                assert await longest_pause(asking) < 0.2
                with pytest.raises(TimeoutError):
                    await asking
        finally:
            os.kill(pid, signal.SIGCONT)
        (silence,) = await asyncio.wait_for(llm.silence_s(), 5)
        assert 0.0 <= silence < 1.0
        assert (await whole(llm.generate("hello", GREEDY))).error is None

    asyncio.run(run())


def test_a_death_wakes_all_who_wait_for_it_though_nobody_asks_for_anything(config: EngineConfig) -> None:
    lost, executor = ExecutorError("step", "its process died", 1), FakeExecutor(num_blocks=64)
    llm = AsyncLLM.from_config(config, executor=executor)

    async def wait() -> tuple[ExecutorError, float]:
        given_up = asyncio.ensure_future(llm.wait_dead())
        await asyncio.sleep(0)
        given_up.cancel()
        return await llm.wait_dead(), time.monotonic()

    with ThreadPoolExecutor(2) as loops:
        waiting = [loops.submit(asyncio.run, wait()) for _ in range(2)]
        time.sleep(0.1)
        assert not any(one.done() for one in waiting)
        began = time.monotonic()
        executor.lose(lost)
        for one in waiting:
            dead, at = one.result(5)
            assert dead is lost
            assert at - began < NOTICE_S
    assert asyncio.run(llm.wait_dead()) is lost
    for call in (llm.state, llm.silence_s):
        with pytest.raises(ExecutorError, match="its process died"):
            asyncio.run(as_coroutine(call))
    llm.shutdown()
    assert asyncio.run(llm.wait_dead()) is lost


def test_a_shutdown_ends_the_wait_for_a_death(make: Make) -> None:
    llm = make()

    async def run() -> None:
        waiting = asyncio.ensure_future(llm.wait_dead())
        await asyncio.sleep(0.01)
        await asyncio.to_thread(llm.shutdown)
        await waiting

    for _ in range(2):
        with pytest.raises(RuntimeError, match="this AsyncLLM is shut down"):
            asyncio.run(run())


# ------------------------------------------------------------ leaving, aborts


def test_abort_at_any_moment_ends_the_stream_once(make: Make) -> None:
    llm = make(staging_polls=5, step_delay_s=0.002)

    async def client(i: int) -> RequestOutput:
        """Aborts after `i // 4` tokens or more, the first four at once: while prepared, staged or waiting."""
        inputs: Any = with_image(i) if i % 2 else f"prompt {i}"
        stream = llm.generate(inputs, LONG, f"r{i}")
        for _ in range(i // 4):
            assert not (await anext(stream)).finished
        answer = asyncio.ensure_future(whole(stream))
        await asyncio.sleep(0.001 * i)
        await llm.abort(f"r{i}")
        return await answer

    async def run() -> list[RequestOutput]:
        await llm.abort("unknown")
        return await asyncio.gather(*(client(i) for i in range(40)))

    outputs = asyncio.run(run())
    assert {output.outputs[0].finish_reason for output in outputs} == {"abort"}
    assert {output.error for output in outputs} == {None}
    assert all(len(tokens_of(output)) >= i // 4 for i, output in enumerate(outputs))
    assert all(tokens_of(output) == scripted(output, 100)[: len(tokens_of(output))] for output in outputs)
    assert_nothing_is_held(llm)


def test_abort_while_the_request_is_being_prepared(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make()
    go_on = slow_down(llm, monkeypatch)

    async def run() -> RequestOutput:
        answer = asyncio.ensure_future(whole(llm.generate("slow", GREEDY, "a")))
        await until(lambda: llm.num_unfinished == 1)
        await llm.abort("a")
        return await asyncio.wait_for(answer, 1)

    output = asyncio.run(run())
    assert output.outputs[0].finish_reason == "abort"
    go_on.set()
    llm._preparers.shutdown(wait=True)
    assert_nothing_is_held(llm)
    assert asyncio.run(llm.stats()).num_scheduled_tokens == 0


@pytest.mark.parametrize("way", ["aclose", "cancel", "break"])
def test_a_consumer_that_leaves_frees_the_requests_blocks(make: Make, way: str) -> None:
    llm = make(step_delay_s=0.002)

    async def client(i: int) -> None:
        stream = llm.generate(f"prompt {i}", LONG)
        async for output in stream:
            if len(tokens_of(output)) > i and way != "cancel":
                break
        if way == "aclose":
            await stream.aclose()  # type: ignore[attr-defined]

    async def run() -> int:
        tasks = [asyncio.ensure_future(client(i)) for i in range(12)]
        if way == "cancel":
            for i, task in enumerate(tasks):
                await asyncio.sleep(0.001 * i)
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: llm.num_unfinished == 0)
        return (await llm.stats()).num_scheduled_tokens

    assert asyncio.run(run()) < 12 * 60, "what was left did not run on"
    assert_nothing_is_held(llm)


def test_a_consumer_cancelled_while_its_request_is_prepared_leaves_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make()
    go_on = slow_down(llm, monkeypatch)

    async def run() -> None:
        tasks = [asyncio.ensure_future(whole(llm.generate("slow", LONG))) for _ in range(20)]
        await until(lambda: llm.num_unfinished == 20)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert llm.num_unfinished == 0
        go_on.set()
        await whole(llm.generate("hello", GREEDY))

    asyncio.run(run())
    assert_nothing_is_held(llm)


def test_a_closed_event_loop_aborts_its_requests_and_no_others(make: Make) -> None:
    llm = make(step_delay_s=0.005)
    loop = asyncio.new_event_loop()
    streams = [llm.generate("hello", LONG) for _ in range(3)]
    for stream in streams:
        loop.run_until_complete(anext(stream))
    loop.close()
    output = asyncio.run(whole(llm.generate("other", GREEDY)))
    assert tokens_of(output) == scripted(output, 6)
    assert_nothing_is_held(llm)
    stats = asyncio.run(llm.stats())
    assert stats.num_scheduled_tokens < 200, "they did not run on"


# ------------------------------------------------------------ drain, shutdown


def test_drain_waits_for_what_runs_and_admits_nothing(make: Make) -> None:
    llm = make(step_delay_s=0.002)

    async def run() -> None:
        answers = [asyncio.ensure_future(whole(llm.generate(f"prompt {i}", LONG))) for i in range(6)]
        await until(lambda: llm.num_unfinished == 6)
        assert await llm.drain(0.01) is False
        with pytest.raises(RuntimeError, match="draining"):
            await anext(llm.generate("late", GREEDY))
        assert llm.is_draining
        assert llm.is_running
        assert await llm.drain() is True
        assert llm.num_unfinished == 0
        for answer in answers:
            output = await answer
            assert tokens_of(output) == scripted(output, 100)
        assert await llm.drain(0.01) is True

    asyncio.run(run())
    assert_nothing_is_held(llm)


@pytest.mark.parametrize("engine_process", [False, True])
def test_shutdown_ends_what_runs_and_says_so_afterwards(
    make: Make, engine_process: bool, others: set[threading.Thread]
) -> None:
    if engine_process:  # its steps take no time: only a long answer is surely not at its end
        llm = make(engine_process=True, fields={"max_model_len": 2048, "num_gpu_blocks_override": 256})
        long = dataclasses.replace(LONG, max_tokens=2000)
    else:
        llm, long = make(step_delay_s=0.01), LONG

    async def run() -> RequestOutput:
        async with llm:
            stream = llm.generate("hello", long)
            await anext(stream)
        return await whole(stream)

    output = asyncio.run(run())
    assert (output.error, output.outputs[0].finish_reason) == ("the engine is shut down", "error")
    assert not llm.is_running
    assert not llm.errored
    calls = (llm.stats, llm.state, llm.silence_s, llm.check_health, lambda: anext(llm.generate("hello", GREEDY)))
    for call in calls:
        with pytest.raises(RuntimeError, match="this AsyncLLM is shut down"):
            asyncio.run(as_coroutine(call))
    llm.shutdown()
    if engine_process:
        with pytest.raises(ProcessLookupError):
            os.kill(llm._client.pid, 0)  # type: ignore[attr-defined]
    else:
        assert not engine_threads() - others


def test_one_that_is_dropped_ends_its_engine(config: EngineConfig, others: set[threading.Thread]) -> None:
    llm = AsyncLLM.from_config(config, executor=FakeExecutor(num_blocks=64))
    assert tokens_of(asyncio.run(whole(llm.generate("hello", GREEDY))))
    (thread,) = engine_threads() - others
    del llm
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_what_an_async_llm_cannot_be_is_refused(tiny_facts: Path, config: EngineConfig) -> None:
    with pytest.raises(ValueError, match="disable_log_stats = False"):
        AsyncLLM(str(tiny_facts), disable_log_stats=False)
    with pytest.raises(ValueError, match="replicas = 2"):
        AsyncLLM.from_config(EngineConfig.from_fields(model=str(tiny_facts), replicas=2))
    with pytest.raises(ConfigError, match="quantization"):
        AsyncLLM(str(tiny_facts), quantization="awq")
    with pytest.raises(ConfigError, match="max_num_seqz"):
        AsyncLLM(str(tiny_facts), max_num_seqz=3)
    with pytest.raises(ValueError, match="executor of type FakeExecutor"):
        AsyncLLM.from_config(config.replace(engine_process=True), executor=FakeExecutor())


def test_a_front_that_cannot_load_leaves_no_engine(
    config: EngineConfig, tmp_path: Path, others: set[threading.Thread]
) -> None:
    with pytest.raises(ValueError, match="cannot be loaded"):
        AsyncLLM.from_config(config.replace(tokenizer=str(tmp_path)), executor=FakeExecutor(num_blocks=64))
    assert not engine_threads() - others
