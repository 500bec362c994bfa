"""Works a file of requests off: reads it as the engine has room, writes each answer as it ends."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dist_vlm.launch.jsonl_request import RequestMaker, answer_of

if TYPE_CHECKING:
    from dist_vlm import LLM, SamplingParams, TextPrompt
    from dist_vlm.launch.jsonl import Line
    from dist_vlm.launch.jsonl_output import AnswerFile


class Batch:
    """One run over the lines of an input.

    bar: told of each answer (a tqdm).
    num_answered, num_failed: lines answered in this run, and how many of them with an error.
    """

    def __init__(self, llm: LLM, answers: AnswerFile, requests: RequestMaker, *, bar: Any) -> None:
        self._llm = llm
        self._answers = answers
        self._requests = requests
        self._bar = bar
        self._under_way: dict[str, Line] = {}
        self._num_taken = 0
        self.num_answered = self.num_failed = 0

    def run(self, lines: Iterable[Line]) -> None:
        """Answers every line that has no answer yet. The engine takes lines as it has room for them; a line that is
        no request is answered with its error there and then."""
        prompts, params = itertools.tee(self._requests_of(lines))
        for output in self._llm.stream((prompt for prompt, _ in prompts), (one for _, one in params)):
            if output.finished:
                self._write(self._under_way.pop(output.request_id), answer_of(output))

    def _requests_of(self, lines: Iterable[Line]) -> Iterator[tuple[TextPrompt, SamplingParams]]:
        for line in lines:
            if self._answers.has(line.index):
                continue
            try:
                request = self._requests.make(line)
            except ValueError as error:
                self._write(line, {"error": str(error)})
                continue
            # The engine numbers requests in the order in which it takes them.
            self._under_way[str(self._num_taken)] = dataclasses.replace(line, values={})
            self._num_taken += 1
            yield request

    def _write(self, line: Line, answer: dict[str, Any]) -> None:
        self._answers.append(line, answer)
        self.num_answered += 1
        self.num_failed += "error" in answer
        self._bar.update()
