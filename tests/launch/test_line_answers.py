from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_vlm.async_llm import AsyncLLM
from dist_vlm.config import EngineConfig
from dist_vlm.executor.base import ExecutorError
from dist_vlm.executor.fake import FakeExecutor
from dist_vlm.launch.jsonl import Line
from dist_vlm.launch.jsonl_request import RequestReader
from dist_vlm.launch.line_answers import LineAnswers
from dist_vlm.sampling import SamplingParams


class NoPictures:
    async def prepare(self, names: Any) -> list[Any]:
        if names:
            raise ValueError(f"{names[0]} is no picture")
        return []


@pytest.fixture
def llm(tiny_facts: Path) -> Iterator[AsyncLLM]:
    fields = {"model": str(tiny_facts), "device": "cpu", "executor": "fake", "max_model_len": 128, "max_num_seqs": 3}
    llm = AsyncLLM.from_config(EngineConfig.from_fields(**fields))
    yield llm
    llm.shutdown()


def answers_of(llm: AsyncLLM) -> LineAnswers:
    return LineAnswers(llm, RequestReader(vision=llm.config.vision, defaults=SamplingParams(max_tokens=4), seed=0))


def ask(llm: AsyncLLM, *values: dict[str, Any]) -> list[Any]:
    async def run() -> list[Any]:
        asking: Any = answers_of(llm)
        lines = [Line(index, index, one) for index, one in enumerate(values, 1)]
        return await asyncio.gather(*(asking.answer(line, NoPictures()) for line in lines), return_exceptions=True)

    return asyncio.run(run())


def test_lines_get_answers_and_wrong_ones_their_error(llm: AsyncLLM) -> None:
    good, unread, unseen, long, late = ask(
        llm,
        {"prompt": "a", "temperature": 0},
        {"promt": "a"},
        {"prompt": "a", "images": ["x.png"]},
        {"prompt": "a" * 900},
        {"prompt": "a", "max_tokens": 7, "temperature": 0},
    )
    assert len(good["token_ids"]) == 4
    assert "unknown key 'promt'" in unread["error"]
    assert unseen == {"error": "x.png is no picture"}
    assert "tokens long" in long["error"]
    assert len(late["token_ids"]) == 7


def test_more_lines_than_the_engine_has_room_for_are_all_answered(llm: AsyncLLM) -> None:
    most = 0
    sound = llm.generate

    def counted(*arguments: Any) -> Any:
        nonlocal most
        most = max(most, llm.num_unfinished + 1)
        return sound(*arguments)

    llm.generate = counted  # type: ignore[method-assign]
    answers = ask(llm, *({"prompt": f"line {index}"} for index in range(40)))
    assert all(len(one["token_ids"]) == 4 for one in answers)
    assert 2 <= most <= 6


def test_lost_ranks_are_raised_and_no_lines_answer(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FakeExecutor) -> None:
        raise ExecutorError("step", "rank 0 died")

    monkeypatch.setattr(FakeExecutor, "collect", fail)
    answers = ask(llm, {"prompt": "a"}, {"prompt": "b"}, {"promt": "c"})
    assert [type(one) for one in answers[:2]] == [ExecutorError] * 2
    assert "rank 0 died" in str(answers[0])
    assert "unknown key" in answers[2]["error"]
