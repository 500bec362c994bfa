"""A picture's way to the engine, where something on it is broken."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dist_vlm.engine.chat_content import Picture
from dist_vlm.media import PictureError
from dist_vlm.server.byte_budget import ByteBudget
from dist_vlm.server.errors import ApiError
from dist_vlm.server.metrics import Metrics
from dist_vlm.server.pictures import PictureIntake

DATA = Picture("data:image/png;base64,AAAA", "messages[0].content[0]")
REMOTE = Picture("http://pictures.example/a.png", "messages[0].content[1]")


class Pool:
    """Answers each picture with an error, or never."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.num_waiting = 0

    async def prepare(self, source: str | bytes, *, name: str) -> Any:
        self.num_waiting += 1
        try:
            if self.error is not None:
                raise self.error
            await asyncio.Event().wait()
        finally:
            self.num_waiting -= 1


class Fetcher:
    async def fetch(self, url: str, *, name: str) -> bytes:
        await asyncio.sleep(0.01)
        raise PictureError(f"{name}: no such host")


def intake(pool: Any, fetcher: Any = None) -> tuple[PictureIntake, ByteBudget]:
    files = ByteBudget("files", 1000, timeout_s=1)
    return PictureIntake(fetcher=fetcher, pool=pool, files=files, max_file_bytes=400, metrics=Metrics("m")), files


def test_a_pool_without_processes_is_a_503_and_no_defect() -> None:
    pictures, files = intake(Pool(RuntimeError("3 starts failed: /usr/lib/x.so")))
    with pytest.raises(ApiError) as caught:
        asyncio.run(pictures.prepare([DATA]))
    assert caught.value.status == 503 and caught.value.retry_after_s and "/usr" not in caught.value.message
    assert files.num_held == 0


def test_one_that_fails_gives_up_the_others_and_their_memory() -> None:
    pool = Pool()
    pictures, files = intake(pool, Fetcher())
    with pytest.raises(PictureError, match=r"messages\[0\].content\[1\]: no such host"):
        asyncio.run(pictures.prepare([DATA, REMOTE, DATA]))
    assert pool.num_waiting == 0 and files.num_held == 0


def test_what_cannot_be_done_here_is_said() -> None:
    without_fetching, _ = intake(Pool())
    assert not without_fetching.fetches
    with pytest.raises(PictureError, match="not fetched here"):
        asyncio.run(without_fetching.prepare([REMOTE]))
    without_pool, _ = intake(None, Fetcher())
    with pytest.raises(ValueError, match="disable_image_processor"):
        asyncio.run(without_pool.prepare([DATA]))
    assert asyncio.run(without_pool.prepare([])) == []
