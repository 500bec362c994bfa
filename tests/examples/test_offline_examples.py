"""The offline examples' own functions, on the demo checkpoint with one rank in this process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from PIL import Image

from dist_vlm import LLM, AsyncLLM
from dist_vlm.launch.jsonl import read_lines
from examples.async_example import ask_all
from examples.llava_example import answer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PICTURES = EXAMPLES / "demo" / "pictures"
MODEL = str(EXAMPLES / "demo" / "checkpoint")
ONE_RANK = {"executor": "inline", "device": "cpu", "dtype": "float32", "kv_cache_memory_gib": 0.03}
EXPECTED = {one["question"]: one for one in json.loads((PICTURES / "questions.json").read_text(encoding="utf-8"))}


def test_the_example_of_the_page_answers() -> None:
    with LLM(model=MODEL, **ONE_RANK) as llm:
        found = answer(llm, Image.open(PICTURES / "digit.png"), "What digit is this?")
    assert found.strip() == EXPECTED["What digit is this?"]["answer"]


def test_several_requests_are_answered_at_once_and_shown_as_they_grow(capsys: pytest.CaptureFixture[str]) -> None:
    questions = ["What do you see?", "How many shapes are there?"]

    async def run() -> list[str]:
        async with AsyncLLM(model=MODEL, **ONE_RANK) as llm:
            return await ask_all(llm, Image.open(PICTURES / "describe.png"), questions)

    described, counted = asyncio.run(run())
    assert described.strip() == EXPECTED["What do you see?"]["answer"]
    assert counted.strip() == "three"
    lines = capsys.readouterr().out.splitlines()
    assert {f"1: {described}", f"2: {counted}"} <= set(lines)
    shown = [line.removeprefix("1: ") for line in lines if line.startswith("1: ")]
    assert len(shown) > 3
    assert all(described.startswith(text) for text in shown)


def test_the_file_of_requests_asks_about_shipped_pictures() -> None:
    with (EXAMPLES / "batch" / "questions.jsonl").open("rb") as file:
        lines = list(read_lines(file))
    assert len(lines) == 5
    for line in lines:
        assert line.problem is None
        names = line.values.get("images") or [
            part["image_url"]["url"]
            for message in line.values["messages"]
            for part in message["content"]
            if part["type"] == "image_url"
        ]
        assert names
        assert all((PICTURES / name).is_file() for name in names)
