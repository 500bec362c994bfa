"""From lines to their answers, by one engine."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dist_vlm.launch.jsonl_request import LineRequest, RequestReader, answer_of, line_faults

if TYPE_CHECKING:
    from dist_vlm import AsyncLLM
    from dist_vlm.engine.images import PreparedImage
    from dist_vlm.launch.jsonl import Line
    from dist_vlm.launch.line_pictures import LinePictures


# Lines whose pictures are on their way at once; none begins while the prepared ones of others take more than this.
_MAX_PREPARING = 64
_MAX_IMAGE_BYTES = 512 << 20


class LineAnswers:
    """Asks an engine, in one event loop. The errors of a line are its answer; those of the engine are raised.

    most_at_once: lines that may be under way. Twice the number of sequences that run at once are let into the engine.
    """

    def __init__(self, llm: AsyncLLM, reader: RequestReader) -> None:
        self._llm = llm
        self._reader = reader
        self._preparing = asyncio.Semaphore(_MAX_PREPARING)
        self._image_bytes = 0
        self._has_room = asyncio.Event()
        self._has_room.set()
        most_in_engine = 2 * llm.config.scheduler.max_num_seqs
        self._seats = asyncio.Semaphore(most_in_engine)
        self.most_at_once = most_in_engine + _MAX_PREPARING

    async def answer(self, line: Line, pictures: LinePictures) -> dict[str, Any]:
        """What is to be written for a line. Raises `ExecutorError` if the ranks are lost."""
        index, num_bytes = line.index, 0
        images: list[PreparedImage] = []
        try:
            with line_faults(index):
                request = self._reader.read(line)
                del line
                if request.pictures:
                    async with self._preparing:
                        await self._has_room.wait()
                        images = await pictures.prepare(request.pictures)
                        request = dataclasses.replace(request, pictures=())
                        num_bytes = sum(image.array.nbytes for image in images)
                        self._hold(num_bytes)
        except ValueError as error:
            return {"error": str(error)}
        try:
            return await self.ask(index, request, images)
        finally:
            self._hold(-num_bytes)

    async def ask(self, index: int, request: LineRequest, images: Sequence[PreparedImage]) -> dict[str, Any]:
        """The answer to a line whose pictures are prepared. Raises `ExecutorError` if the ranks are lost."""
        try:
            with line_faults(index):
                inputs = await self._inputs(request, images)
            async with self._seats:
                async for news in self._llm.generate(inputs, request.params):
                    output = news
        except ValueError as error:
            return {"error": str(error)}
        if output.error is not None and self._llm.dead_error is not None:
            raise self._llm.dead_error
        return answer_of(output)

    async def _inputs(self, request: LineRequest, images: Sequence[PreparedImage]) -> Any:
        """A template is rendered in a thread: it may take long."""
        chat = self._llm.front.chat
        if isinstance(request.text, str) and not images:
            return request.inputs(chat, images)
        return await asyncio.to_thread(request.inputs, chat, images)

    def _hold(self, num_bytes: int) -> None:
        self._image_bytes += num_bytes
        if self._image_bytes > _MAX_IMAGE_BYTES:
            self._has_room.clear()
        else:
            self._has_room.set()
