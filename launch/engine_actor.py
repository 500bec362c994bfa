"""One replica as an actor: it drives a tensor-parallel group and answers many lines at once."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import pyarrow as pa  # type: ignore[import-untyped]

from dist_vlm.executor.base import ExecutorError
from dist_vlm.launch.line_answers import LineAnswers
from dist_vlm.launch.line_table import AnsweredLine, PreparedLine, prepared_lines
from dist_vlm.workers.failure import describe

if TYPE_CHECKING:
    from dist_vlm.config import EngineConfig
    from dist_vlm.launch.jsonl_request import RequestReader

_log = logging.getLogger(__name__)


class EngineActor:
    """Answers lines until its ranks are lost: it is then to be replaced.

    config: resolved, of one replica.
    """

    def __init__(self, config: EngineConfig, reader: RequestReader) -> None:
        """What goes wrong is told by `problem`: of an actor that does not come up Ray tells at length."""
        from dist_vlm import AsyncLLM

        self._reader = reader
        self._problem: str | None = None
        try:
            self._llm = AsyncLLM.from_config(config)
            self._answers = LineAnswers(self._llm, reader)
        except Exception as error:
            _log.error("the engine does not start", exc_info=True)
            self._problem = describe(error)

    async def problem(self) -> str | None:
        """Why the engine did not start; None once it has."""
        return self._problem

    async def answer(self, table: pa.Table) -> pa.Table:
        """A table of prepared lines to one of their answers. `lost` is set in it where the ranks are lost."""
        answered = await asyncio.gather(*map(self._answered, prepared_lines(table)))
        return pa.concat_tables([one.table() for one in answered])

    async def _answered(self, prepared: PreparedLine) -> AnsweredLine:
        if prepared.error is not None:
            return AnsweredLine(prepared.line, {"error": prepared.error})
        request = self._reader.read(prepared.line)
        try:
            return AnsweredLine(prepared.line, await self._answers.ask(prepared.line.index, request, prepared.images))
        except ExecutorError as error:
            return AnsweredLine(prepared.line, lost=describe(error))
