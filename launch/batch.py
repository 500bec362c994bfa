"""Works a file of requests off: reads it as the engine has room, writes each answer as it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

from dist_vlm.launch.bounded_tasks import BoundedTasks

if TYPE_CHECKING:
    from dist_vlm.launch.jsonl import Line
    from dist_vlm.launch.jsonl_output import AnswerFile


class Batch:
    """One run over the lines of an input.

    bar: told of each answer (a tqdm).
    num_answered, num_failed: lines answered in this run, and how many of them with an error.
    """

    def __init__(self, answers: AnswerFile, *, bar: Any) -> None:
        self._answers = answers
        self._bar = bar
        self.num_answered = self.num_failed = 0

    async def run(
        self, lines: Iterable[Line], answer: Callable[[Line], Awaitable[dict[str, Any]]], *, most_at_once: int
    ) -> None:
        """Answers every line that has no answer yet. A line that waits, for a picture or for room in the engine, keeps
        no other waiting; `most_at_once` are under way. Raises the first thing that `answer` does, and gives the others
        up.
        """
        async with BoundedTasks(most_at_once) as tasks:
            for line in lines:
                if not self._answers.has(line.index):
                    await tasks.start(self._work_off(line, answer))

    def has(self, index: int) -> bool:
        """Whether the line has an answer, of this run or of one before."""
        return self._answers.has(index)

    def write(self, line: Line, answer: dict[str, Any]) -> None:
        """Raises `ValueError` where the line has an answer."""
        self._answers.append(line, answer)
        self.num_answered += 1
        self.num_failed += "error" in answer
        self._bar.update()

    async def _work_off(self, line: Line, answer: Callable[[Line], Awaitable[dict[str, Any]]]) -> None:
        asked, line = answer(line), dataclasses.replace(line, values={})  # which may hold pictures
        self.write(line, await asked)
