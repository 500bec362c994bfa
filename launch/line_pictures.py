"""The pictures of lines on their way to the engine: read or fetched, decoded, preprocessed, beside each other."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from dist_vlm.engine.images import ImagePreparer, PreparedImage
from dist_vlm.launch.local_media import LocalMedia, short
from dist_vlm.launch.remote_media import RemoteMedia, is_remote
from dist_vlm.machine import usable_cores
from dist_vlm.media import to_rgb
from dist_vlm.media.picture_source import open_file
from dist_vlm.workers.models import get_family, read_spec

if TYPE_CHECKING:
    from PIL import Image

    from dist_vlm.config import EngineConfig

# Decoding and resizing are done outside Python's lock.
_MAX_THREADS = 4


class LinePictures:
    """Makes of a line's pictures what the engine takes, and what `LLM.generate` makes of them. Used in one event loop;
    `close` ends its threads and `remote`.

    preparer: of `image_preparer`.
    """

    def __init__(self, preparer: ImagePreparer, *, config: EngineConfig, local: LocalMedia, remote: RemoteMedia):
        self._preparer = preparer
        self._max_pixels = config.vision.max_image_pixels
        self._local = local
        self._remote = remote
        self._threads = ThreadPoolExecutor(min(_MAX_THREADS, usable_cores()), thread_name_prefix="pictures")

    async def prepare(self, names: Sequence[Any]) -> list[PreparedImage]:
        """All pictures of a line, in order. Raises `ValueError` naming the one that cannot be used; the others are then
        given up."""
        tasks = [asyncio.create_task(self._prepare_one(name)) for name in names]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def close(self) -> None:
        await self._remote.close()
        self._threads.shutdown(cancel_futures=True)

    async def _prepare_one(self, name: Any) -> PreparedImage:
        loop = asyncio.get_running_loop()
        if isinstance(name, str) and is_remote(name):
            async with self._remote.fetched(name) as data:
                return await loop.run_in_executor(self._threads, self._of_file, data, short(name))
        return await loop.run_in_executor(self._threads, self._of_local, name)

    def _of_file(self, data: bytes, name: str) -> PreparedImage:
        picture = open_file(data, name=name, max_pixels=self._max_pixels, max_bytes=len(data))
        return self._prepared(to_rgb(picture, max_pixels=self._max_pixels, name=name), name)

    def _of_local(self, name: Any) -> PreparedImage:
        return self._prepared(self._local.load(name), short(name))

    def _prepared(self, picture: Image.Image, name: str) -> PreparedImage:
        return self._preparer.preprocessed(self._preparer.decoded(picture, name))


def image_preparer(config: EngineConfig) -> ImagePreparer:
    """What a resolved configuration makes of pictures."""
    spec = read_spec(config.model.model)
    processor = None
    if spec.image_token_id is not None and not config.vision.disable_image_processor:
        processor = get_family(spec.family).image_processor(spec, config.vision.image_processor)
    return ImagePreparer(spec=spec, vision=config.vision, processor=processor)
