"""A request's pictures on their way to the engine: fetched, decoded in other processes, within a memory budget."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from dist_vlm.engine.chat_content import Picture
from dist_vlm.engine.images import PreparedImage
from dist_vlm.engine.picture_pool import PicturePool, PooledImage
from dist_vlm.media import PictureError
from dist_vlm.media.fetch import PictureFetcher
from dist_vlm.server.byte_budget import ByteBudget
from dist_vlm.server.errors import ApiError
from dist_vlm.server.metrics import Metrics


class PictureIntake:
    """Used in the event loop alone; fetching and decoding are done elsewhere.

    fetcher: None where pictures are not fetched. pool: None where none are decoded: the model takes no pictures, or it
        has no image processor here.
    files: budget of the picture files that are being fetched or decoded. max_file_bytes: longest file.
    """

    def __init__(
        self,
        *,
        fetcher: PictureFetcher | None,
        pool: PicturePool | None,
        files: ByteBudget,
        max_file_bytes: int,
        metrics: Metrics,
    ) -> None:
        self._fetcher = fetcher
        self._pool = pool
        self._files = files
        self._max_file_bytes = max_file_bytes
        self._metrics = metrics

    @property
    def fetches(self) -> bool:
        """Whether pictures may be given by http(s) URLs."""
        return self._fetcher is not None

    async def prepare(self, pictures: Sequence[Picture]) -> list[PreparedImage]:
        """All pictures of a request, in order, ready for the engine. Raises `ValueError` naming the picture that cannot
        be used; the others are then given up."""
        if pictures and self._pool is None:
            raise ValueError(
                f"messages have {len(pictures)} picture(s), but this server runs with disable_image_processor"
            )
        tasks = [asyncio.create_task(self._prepare_one(picture)) for picture in pictures]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def _prepare_one(self, picture: Picture) -> PreparedImage:
        assert isinstance(picture.source, str), "JSON holds no other pictures"
        size = self._max_file_bytes if picture.is_remote else len(picture.source)
        async with self._files.share(min(size, self._files.capacity)) as share:
            source: str | bytes = picture.source
            if picture.is_remote:
                source = await self._fetch(picture)
                share.shrink(len(source))
            self._metrics.images.labels("decode").inc()
            pooled = await self._decoded(source, picture.name)
        self._metrics.image_seconds.labels("decode").observe(pooled.decode_s)
        self._metrics.image_seconds.labels("preprocess").observe(pooled.preprocess_s)
        self._metrics.image_bytes.labels("decode").inc(len(source))
        self._metrics.image_bytes.labels("preprocess").inc(pooled.image.array.nbytes)
        return pooled.image

    async def _decoded(self, source: str | bytes, name: str) -> PooledImage:
        assert self._pool is not None, "prepare() has refused pictures without"
        try:
            return await self._pool.prepare(source, name=name)
        except RuntimeError as error:
            text = f"{name}: no picture can be decoded now: try again later"
            raise ApiError(503, text, code="pictures_unavailable", retry_after_s=10) from error

    async def _fetch(self, picture: Picture) -> bytes:
        if self._fetcher is None:
            raise PictureError(f"{picture.name}: pictures are not fetched here; give it as a data: URL")
        began = time.monotonic()
        assert isinstance(picture.source, str)
        data = await self._fetcher.fetch(picture.source, name=picture.name)
        self._metrics.images.labels("fetch").inc()
        self._metrics.image_seconds.labels("fetch").observe(time.monotonic() - began)
        self._metrics.image_bytes.labels("fetch").inc(len(data))
        return data
