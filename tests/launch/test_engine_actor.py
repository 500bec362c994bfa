"""The actor's class without Ray around it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pytest

from dist_vlm.config import EngineConfig, resolve
from dist_vlm.executor.base import ExecutorError
from dist_vlm.executor.fake import FakeExecutor
from dist_vlm.launch.engine_actor import EngineActor
from dist_vlm.launch.jsonl import Line
from dist_vlm.launch.jsonl_request import RequestReader
from dist_vlm.launch.line_table import AnsweredLine, PreparedLine, answered_lines
from dist_vlm.sampling import SamplingParams


def actor_of(model: Path, **fields: Any) -> EngineActor:
    given = {"model": str(model), "device": "cpu", "executor": "fake", "max_model_len": 128} | fields
    config = resolve(EngineConfig.from_fields(**given))
    return EngineActor(config, RequestReader(vision=config.vision, defaults=SamplingParams(max_tokens=4), seed=0))


def ask(actor: EngineActor, *lines: PreparedLine) -> list[AnsweredLine]:
    table = pa.concat_tables([line.table() for line in lines])
    return list(answered_lines(asyncio.run(actor.answer(table))))


def test_lines_are_answered_and_errors_passed_on(tiny_facts: Path) -> None:
    actor = actor_of(tiny_facts)
    assert asyncio.run(actor.problem()) is None
    good, wrong = ask(
        actor, PreparedLine(Line(3, "three", {"prompt": "a"})), PreparedLine(Line(4, 4, {}), error="no picture")
    )
    actor._llm.shutdown()
    assert (good.line, len(good.answer["token_ids"])) == (Line(3, "three", {}), 4)
    assert (wrong.line, wrong.answer) == (Line(4, 4, {}), {"error": "no picture"})


def test_lost_ranks_are_told(tiny_facts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FakeExecutor) -> None:
        raise ExecutorError("step", "rank 0 died")

    actor = actor_of(tiny_facts)
    monkeypatch.setattr(FakeExecutor, "collect", fail)
    (lost,) = ask(actor, PreparedLine(Line(1, 1, {"prompt": "a"})))
    actor._llm.shutdown()
    assert "rank 0 died" in str(lost.lost)
    assert lost.answer == {}


def test_an_engine_that_does_not_start_says_why(tiny_facts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FakeExecutor) -> None:
        raise ExecutorError("load", "no memory")

    monkeypatch.setattr(FakeExecutor, "start", fail)
    assert "no memory" in str(asyncio.run(actor_of(tiny_facts).problem()))
