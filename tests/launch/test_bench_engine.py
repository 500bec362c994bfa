from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bench_fakes import SlowLLM

from dist_vlm import ConfigError, EngineConfig
from dist_vlm.config import resolve
from dist_vlm.launch.bench_engine import check_pictures_fit
from dist_vlm.outputs import RequestOutput


def test_a_run_is_greedy_goes_past_the_end_and_is_timed() -> None:
    llm = SlowLLM(lambda prompts, tokens: prompts + 0.5 * tokens, apart=0.25)
    timed = llm.engine().run(["a", "b", "c"], 8)
    assert timed.seconds == 7
    assert (timed.num_prompt_tokens, timed.num_output_tokens) == (300, 24)
    assert timed.first_token_s == [1.0, 1.25, 1.5]
    ((prompts, params),) = llm.calls
    assert prompts == ["a", "b", "c"]
    assert (params.temperature, params.max_tokens, params.ignore_eos) == (0.0, 8, True)


def test_a_batch_overlaps_while_the_last_begins_before_the_first_has_ended() -> None:
    # An answer of 8 tokens takes 7 ms from the first to the last.
    assert SlowLLM(lambda *_: 1, apart=0.0034).engine().run(["a", "b", "c"], 8).overlapped
    assert not SlowLLM(lambda *_: 1, apart=0.0036).engine().run(["a", "b", "c"], 8).overlapped


def test_what_changed_the_work_is_counted() -> None:
    def change(output: RequestOutput) -> None:
        output.num_preemptions, output.num_cached_tokens = 1, int(output.request_id)

    timed = SlowLLM(lambda *_: 1, change=change).engine().run(["a", "b", "c"], 8)
    assert timed.books() == {"preemptions": 3, "cached_prompt_tokens": 3}


def _fail(output: RequestOutput) -> None:
    output.error = "the picture is broken" if output.request_id == "1" else None


def _shorten(output: RequestOutput) -> None:
    del output.outputs[0].token_ids[6:]


@pytest.mark.parametrize(
    ("change", "message"),
    [(_fail, "request 1 failed: the picture is broken"), (_shorten, "request 0 has 6 tokens: must have 8")],
)
def test_an_answer_that_is_not_the_work_ends_the_run(change: Callable[[RequestOutput], None], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        SlowLLM(lambda *_: 1, change=change).engine().run(["a", "b"], 8)


def test_a_missing_answer_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = SlowLLM(lambda *_: 1)
    monkeypatch.setattr(llm, "generate", lambda *_, use_tqdm: [])
    with pytest.raises(RuntimeError, match="0 of 2 requests were answered"):
        llm.engine().run(["a", "b"], 8)


@pytest.mark.parametrize(
    ("fields", "num_tokens", "message"),
    [
        # 16 tokens of a picture, at least 48 of words.
        ({"max_model_len": 100}, 37, "--output-tokens = 37: must be at most 36: a prompt and its answer have 100"),
        ({"max_model_len": 64}, 1, "model.max_model_len = 64: must be above 64"),
        ({"disable_image_processor": True}, 1, "vision: the configuration takes no pictures"),
    ],
)
def test_requests_that_do_not_fit_are_refused(
    tiny_facts: Path, fields: dict[str, object], num_tokens: int, message: str
) -> None:
    config = resolve(EngineConfig.from_fields(model=str(tiny_facts), device="cpu", **fields))
    with pytest.raises(ConfigError, match=message):
        check_pictures_fit(config, num_tokens=num_tokens)


def test_the_longest_that_may_fit_passes(tiny_facts: Path) -> None:
    config = resolve(EngineConfig.from_fields(model=str(tiny_facts), device="cpu", max_model_len=100))
    check_pictures_fit(config, num_tokens=36)
