"""Files of requests against answers that are scripted."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_vlm.launch.batch import Batch
from dist_vlm.launch.jsonl import Line, read_lines
from dist_vlm.launch.jsonl_output import AnswerFile

AT_ONCE = 3


class Script:
    """Answers a line whose prompt is a number after that many rounds of the event loop, "wrong" with an error at once,
    and "never" not at all. Breaks down after `lives` answers."""

    def __init__(self, lives: int = 10**9) -> None:
        self.asked: list[int] = []
        self.cancelled: list[int] = []
        self.under_way = self.most = 0
        self.lives = lives

    async def answer(self, line: Line) -> dict[str, Any]:
        self.asked.append(line.index)
        prompt, index = line.values["prompt"], line.index
        if prompt == "wrong":
            return {"error": "a wrong line"}
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            for _ in range(10**9 if prompt == "never" else int(prompt)):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled.append(index)
            raise
        self.under_way -= 1
        if self.lives == 0:
            raise RuntimeError("the ranks are lost")
        self.lives -= 1
        return {"text": f"answer {prompt} {index}"}


class Folder:
    """An input and its output."""

    def __init__(self, folder: Path, prompts: list[str]) -> None:
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.input.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))

    def run(self, script: Script, *, resume: bool = False) -> Batch:
        bar = SimpleNamespace(update=lambda: None)
        with AnswerFile(str(self.output), max_index=10**6, resume=resume) as answers, self.input.open("rb") as file:
            batch = Batch(answers, bar=bar)
            asyncio.run(batch.run(read_lines(file), script.answer, most_at_once=AT_ONCE))
        return batch

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]


def test_each_line_is_answered_in_the_order_of_the_ends(tmp_path: Path) -> None:
    folder = Folder(tmp_path, ["40", "20", "wrong", "60", "5"])
    batch = folder.run(Script())
    records = folder.records()
    assert [record["index"] for record in records] == [3, 2, 5, 1, 4]
    assert records[0] == {"id": 3, "index": 3, "error": "a wrong line"}
    assert records[1] == {"id": 2, "index": 2, "text": "answer 20 2"}
    assert (batch.num_answered, batch.num_failed) == (5, 1)


@pytest.mark.parametrize("prompts", [[], ["wrong"], ["wrong", "wrong"]])
def test_an_input_without_a_request(tmp_path: Path, prompts: list[str]) -> None:
    folder = Folder(tmp_path, prompts)
    folder.run(Script())
    assert [record["error"] for record in folder.records()] == ["a wrong line"] * len(prompts)


def test_no_more_lines_are_read_than_are_under_way(tmp_path: Path) -> None:
    folder, script = Folder(tmp_path, ["9"] * 10), Script(lives=1)
    with pytest.raises(RuntimeError, match="the ranks are lost"):
        folder.run(script)
    assert script.most == AT_ONCE
    assert len(script.asked) <= 1 + AT_ONCE
    (done,) = folder.records()
    again = Script()
    folder.run(again, resume=True)
    assert again.asked == [index for index in range(1, 11) if index != done["index"]]
    folder.run(idle := Script(), resume=True)
    assert idle.asked == []


def test_a_line_that_waits_keeps_no_other_waiting_and_is_given_up_at_an_error(tmp_path: Path) -> None:
    folder, script = Folder(tmp_path, ["never", *["2"] * 20]), Script(lives=19)
    with pytest.raises(RuntimeError, match="the ranks are lost"):
        folder.run(script)
    assert sorted(record["index"] for record in folder.records()) == list(range(2, 21))
    assert 1 in script.cancelled


def test_a_run_that_breaks_off_again_and_again_answers_each_line_once(tmp_path: Path) -> None:
    prompts = ["1", "wrong", "7", "3", "9", "2", "wrong", "4"]
    folder, num_runs, over = Folder(tmp_path, prompts), 0, False
    while not over:
        num_runs += 1
        with contextlib.suppress(RuntimeError):
            folder.run(Script(lives=2), resume=num_runs > 1)
            over = True
    assert num_runs > 2
    records = sorted(folder.records(), key=lambda record: record["index"])
    assert [record["index"] for record in records] == list(range(1, 9))
    told = [record.get("text", record.get("error")) for record in records]
    assert told == [
        "a wrong line" if prompt == "wrong" else f"answer {prompt} {index}" for index, prompt in enumerate(prompts, 1)
    ]
