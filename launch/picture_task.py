"""What a Ray Data task does with a part of the input: reads or fetches its lines' pictures, decodes, preprocesses."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa  # type: ignore[import-untyped]

from dist_vlm.config import EngineConfig
from dist_vlm.launch.jsonl import parse_line
from dist_vlm.launch.jsonl_request import RequestReader, line_faults
from dist_vlm.launch.line_pictures import LinePictures, image_preparer
from dist_vlm.launch.line_table import PreparedLine
from dist_vlm.launch.local_media import LocalMedia
from dist_vlm.launch.remote_media import RemoteMedia

if TYPE_CHECKING:
    from dist_vlm.engine.images import ImagePreparer
    from dist_vlm.launch.jsonl import Line
    from dist_vlm.launch.picture_setup import PictureSetup

# Lines of a task that are under way or ready at once. The first that waits for its host holds so many back at most.
LINES_AHEAD = 16


def prepare_part(numbers: pa.Table, *, source: Any, reader: RequestReader, setup: PictureSetup) -> Iterator[pa.Table]:
    """Yields a table for each line of the parts, in their order: Ray tries a task again that was lost, and passes over
    as many of its results as it had before.

    source: the actor that has the lines.
    """
    import ray

    for number in numbers["id"].to_pylist():
        part = ray.get(source.part.remote(number))
        lines = (parse_line(raw, index) for index, raw in part)
        for prepared in prepared_in_order(lines, reader=reader, setup=setup):
            yield table_of(prepared)


def table_of(prepared: PreparedLine) -> pa.Table:
    try:
        return prepared.table()
    except RecursionError:
        return PreparedLine(prepared.line, error="the line is nested too deeply").table()


def prepared_in_order(
    lines: Iterable[Line], *, reader: RequestReader, setup: PictureSetup, most_ahead: int = LINES_AHEAD
) -> Iterator[PreparedLine]:
    """The work goes on in a thread of its own while a result waits to be taken: a time that runs is no picture's.

    most_ahead: lines that are under way or ready, and not taken.
    """
    local = LocalMedia(Path(setup.media_root), max_pixels=setup.config.vision.max_image_pixels)
    preparer = _preparer(json.dumps(setup.config.fields()))
    pictures = LinePictures(preparer, config=setup.config, local=local, remote=RemoteMedia(setup.server))

    async def prepare(line: Line) -> PreparedLine:
        try:
            with line_faults(line.index):
                request = reader.read(line)
                return PreparedLine(line, await pictures.prepare(request.pictures))
        except ValueError as error:
            return PreparedLine(line, error=str(error))

    under_way: deque[Future[PreparedLine]] = deque()
    waiting = iter(lines)
    with _loop_thread() as loop:
        try:
            while True:
                for line in itertools.islice(waiting, most_ahead - len(under_way)):
                    under_way.append(asyncio.run_coroutine_threadsafe(prepare(line), loop))
                if not under_way:
                    return
                yield under_way.popleft().result()
        finally:
            for one in under_way:
                one.cancel()
            asyncio.run_coroutine_threadsafe(pictures.close(), loop).result()


@contextmanager
def _loop_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own; leaving it ends both, and what still runs there."""
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def run() -> None:
        over = asyncio.Event()
        begun.set_result((asyncio.get_running_loop(), over))
        await over.wait()

    def work() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            if begun.done():
                raise
            begun.set_exception(error)

    thread = threading.Thread(target=work, name="prepare-part", daemon=True)
    thread.start()
    loop, over = begun.result()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()


@functools.lru_cache(maxsize=1)
def _preparer(fields: str) -> ImagePreparer:
    """Loaded once in each process."""
    return image_preparer(EngineConfig.from_fields(**json.loads(fields)))
