"""What a Ray Data task does with a part of the input: reads or fetches its lines' pictures, decodes, preprocesses."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa  # type: ignore[import-untyped]

from dist_vlm.config import EngineConfig
from dist_vlm.launch.jsonl_request import RequestReader, line_faults
from dist_vlm.launch.line_pictures import LinePictures, image_preparer
from dist_vlm.launch.line_table import PreparedLine
from dist_vlm.launch.local_media import LocalMedia
from dist_vlm.launch.remote_media import RemoteMedia

if TYPE_CHECKING:
    from dist_vlm.engine.images import ImagePreparer
    from dist_vlm.launch.jsonl import Line
    from dist_vlm.launch.picture_setup import PictureSetup


def prepare_part(numbers: pa.Table, *, source: Any, reader: RequestReader, setup: PictureSetup) -> Iterator[pa.Table]:
    """Yields a table for each line of the parts, as it is ready: one that waits for its host keeps no other back.

    source: the actor that has the lines.
    """
    import ray

    for number in numbers["id"].to_pylist():
        lines = ray.get(source.part.remote(number))
        for prepared in prepared_as_ready(lines, reader=reader, setup=setup):
            yield prepared.table()


def prepared_as_ready(lines: list[Line], *, reader: RequestReader, setup: PictureSetup) -> Iterator[PreparedLine]:
    """In a thread of its own the work goes on while a result waits to be taken: a time that runs is no picture's."""
    results: queue.SimpleQueue[PreparedLine | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            asyncio.run(_prepare_all(lines, reader, setup, results.put))
        except BaseException as error:
            results.put(error)

    thread = threading.Thread(target=run, name="prepare-part", daemon=True)
    thread.start()
    for _ in lines:
        result = results.get()
        if isinstance(result, BaseException):
            raise result
        yield result
    thread.join()


async def _prepare_all(
    lines: list[Line], reader: RequestReader, setup: PictureSetup, tell: Callable[[PreparedLine], None]
) -> None:
    local = LocalMedia(Path(setup.media_root), max_pixels=setup.config.vision.max_image_pixels)
    pictures = LinePictures(
        _preparer(json.dumps(setup.config.fields())), config=setup.config, local=local, remote=RemoteMedia(setup.server)
    )

    async def prepare(line: Line) -> None:
        try:
            with line_faults(line.index):
                request = reader.read(line)
                tell(PreparedLine(line, await pictures.prepare(request.pictures)))
        except ValueError as error:
            tell(PreparedLine(line, error=str(error)))

    async with contextlib.AsyncExitStack() as ending:
        ending.push_async_callback(pictures.close)
        await asyncio.gather(*map(prepare, lines))


@functools.lru_cache(maxsize=1)
def _preparer(fields: str) -> ImagePreparer:
    """Loaded once in each process."""
    return image_preparer(EngineConfig.from_fields(**json.loads(fields)))
