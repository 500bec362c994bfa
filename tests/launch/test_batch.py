"""Files of requests against an engine whose answers are scripted."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_vlm.launch.batch import Batch
from dist_vlm.launch.jsonl import read_lines
from dist_vlm.launch.jsonl_output import AnswerFile
from dist_vlm.outputs import CompletionOutput, RequestOutput

AT_ONCE = 3


class ScriptedLLM:
    """Takes `AT_ONCE` prompts at a time and ends them in reverse; fails those of the prompt "fail", and breaks down
    after `lives` answers."""

    def __init__(self, lives: int = 10**9) -> None:
        self.prompts: list[str] = []
        self.lives = lives

    def stream(self, prompts: Iterator[Any], params: Iterator[Any]) -> Iterator[RequestOutput]:
        pairs = enumerate(zip(prompts, params, strict=True))
        while taken := [pair for _, pair in zip(range(AT_ONCE), pairs, strict=False)]:
            for number, (prompt, param) in reversed(taken):
                self.prompts.append(prompt["prompt"])
                output = RequestOutput(str(number), None, [1], [CompletionOutput(0, "", [])], finished=False)
                yield output
                output.outputs = [CompletionOutput(0, f"{prompt['prompt']} {param}", [7, 8], finish_reason="stop")]
                output.finished = True
                output.error = "no room" if prompt["prompt"] == "fail" else None
                if self.lives == 0:
                    raise RuntimeError("the ranks are lost")
                self.lives -= 1
                yield output


class Maker:
    """A request of each line, unless its prompt is "wrong"."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def make(self, line: Any) -> tuple[Any, Any]:
        self.made.append(line.index)
        if line.values["prompt"] == "wrong":
            raise ValueError("a wrong line")
        return {"prompt": line.values["prompt"]}, line.index


class Folder:
    """An input and its output."""

    def __init__(self, folder: Path, prompts: list[str]) -> None:
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.input.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))

    def run(self, llm: ScriptedLLM, *, resume: bool = False) -> Batch:
        bar, self.maker = SimpleNamespace(update=lambda: None), Maker()
        with AnswerFile(str(self.output), max_index=10**6, resume=resume) as answers, self.input.open("rb") as file:
            batch = Batch(llm, answers, self.maker, bar=bar)  # type: ignore[arg-type]
            batch.run(read_lines(file))
        return batch

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]


def test_each_line_is_answered_in_the_order_of_the_ends(tmp_path: Path) -> None:
    folder = Folder(tmp_path, ["a", "b", "wrong", "c", "fail"])
    batch = folder.run(ScriptedLLM())
    records = folder.records()
    # The wrong line is answered when it is met, with a and b taken and not ended.
    assert [record["index"] for record in records] == [3, 4, 2, 1, 5]
    assert [record.get("text") for record in records] == [None, "c 4", "b 2", "a 1", None]
    assert records[0] == {"id": 3, "index": 3, "error": "a wrong line"}
    assert records[-1] == {"id": 5, "index": 5, "error": "no room"}
    assert (batch.num_answered, batch.num_failed) == (5, 2)


@pytest.mark.parametrize("prompts", [[], ["wrong"], ["wrong", "wrong"]])
def test_an_input_without_a_request(tmp_path: Path, prompts: list[str]) -> None:
    folder = Folder(tmp_path, prompts)
    folder.run(ScriptedLLM())
    assert [record["error"] for record in folder.records()] == ["a wrong line"] * len(prompts)


def test_lines_are_read_as_the_engine_takes_them(tmp_path: Path) -> None:
    folder = Folder(tmp_path, [f"p{index}" for index in range(10)])
    with pytest.raises(RuntimeError, match="the ranks are lost"):
        folder.run(ScriptedLLM(lives=1))
    assert folder.maker.made == [1, 2, 3]
    assert [record["index"] for record in folder.records()] == [3]
    folder.run(ScriptedLLM(), resume=True)
    assert folder.maker.made == [1, 2, *range(4, 11)]
    folder.run(ScriptedLLM(), resume=True)
    assert folder.maker.made == []


def test_a_run_that_breaks_off_again_and_again_answers_each_line_once(tmp_path: Path) -> None:
    prompts = ["a", "wrong", "b", "c", "fail", "e", "wrong", "f"]
    folder, num_runs, over = Folder(tmp_path, prompts), 0, False
    while not over:
        num_runs += 1
        with contextlib.suppress(RuntimeError):
            folder.run(ScriptedLLM(lives=2), resume=num_runs > 1)
            over = True
    assert num_runs > 2
    records = sorted(folder.records(), key=lambda record: record["index"])
    assert [record["index"] for record in records] == list(range(1, 9))
    told = [record.get("text", record.get("error")) for record in records]
    assert told == ["a 1", "a wrong line", "b 3", "c 4", "no room", "e 6", "a wrong line", "f 8"]
