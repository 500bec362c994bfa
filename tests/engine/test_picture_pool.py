"""Pictures prepared in other processes: the same as in this one, and what becomes of them when a process is lost."""

from __future__ import annotations

import asyncio
import base64
import functools
import gc
import io
import os
import re
import signal
import sys
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_vlm.config import EngineConfig, resolve
from dist_vlm.engine import picture_pool
from dist_vlm.engine.images import ImagePreparer, PreparedImage
from dist_vlm.engine.picture_client import PictureClient
from dist_vlm.engine.picture_pool import PicturePool
from dist_vlm.media import PictureError
from dist_vlm.workers.models import get_family, read_spec

from .scripted_pictures import scripted_program

MAX_PIXELS = 20_000_000
MEMORY_BYTES = 64 << 20
MAX_BYTES = 80 << 20
WAIT_S = 30.0


@pytest.fixture(scope="module")
def config(tiny_facts: Path) -> EngineConfig:
    return resolve(EngineConfig.from_fields(model=str(tiny_facts), device="cpu", max_image_pixels=MAX_PIXELS))


@pytest.fixture(scope="module")
def preparer(config: EngineConfig) -> ImagePreparer:
    spec = read_spec(config.model.model)
    processor = get_family(spec.family).image_processor(spec, None)
    return ImagePreparer(spec=spec, vision=config.vision, processor=processor)


@pytest.fixture(scope="module")
def pool(config: EngineConfig) -> Iterator[PicturePool]:
    """Two real processes."""
    made = PicturePool(config, num_workers=2, memory_bytes=MEMORY_BYTES, max_bytes=MAX_BYTES)
    made.start()
    yield made
    made.close()


@pytest.fixture
def scripted(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., PicturePool]]:
    """Pools of scripted processes; `script` makes those that are started from then on others."""
    made: list[PicturePool] = []

    def script(**script: str) -> None:
        client = functools.partial(PictureClient, program=scripted_program(**script))
        monkeypatch.setattr(picture_pool, "PictureClient", client)

    def make(num_workers: int = 1, timeout_s: float = WAIT_S) -> PicturePool:
        script()
        made.append(PicturePool(config, num_workers=num_workers, memory_bytes=1, max_bytes=1000, timeout_s=timeout_s))
        made[-1].start()
        return made[-1]

    make.script = script  # type: ignore[attr-defined]
    yield make
    for pool in made:
        pids = pids_of(pool)
        pool.close()
        assert not any(map(exists, pids))


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, WAIT_S))


def pids_of(pool: PicturePool) -> list[int]:
    return sorted(client.pid for client in pool._clients)


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def texts(pool: PicturePool, *sources: str | bytes) -> list[str]:
    """What is said of each picture, named after its place; empty if it is prepared."""
    tasks = [pool.prepare(source, name=f"image {index}") for index, source in enumerate(sources)]
    return [
        "" if not isinstance(result, BaseException) else f"{type(result).__name__} {result}"
        for result in await asyncio.gather(*tasks, return_exceptions=True)
    ]


def noise(seed: int, size: tuple[int, int] = (80, 60), channels: int = 3) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def assert_same(pooled: PreparedImage, ours: PreparedImage) -> None:
    assert (pooled.key, pooled.kind) == (ours.key, ours.kind)
    np.testing.assert_array_equal(pooled.array, ours.array, strict=True)


# ------------------------------------------------------------------------------------------------- real processes


def test_every_picture_is_prepared_as_in_this_process(pool: PicturePool, preparer: ImagePreparer) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encoded(noise(0), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
    files += [
        encoded(noise(1, channels=4)),
        encoded(noise(2), "JPEG", exif=exif),
        encoded(noise(3).convert("CMYK"), "JPEG"),
        encoded(Image.fromarray(np.random.default_rng(4).integers(0, 65536, (9, 7), dtype=np.uint16))),
        encoded(noise(5, size=(1, 1))),
    ]

    async def both() -> None:
        for file in files:
            (ours,) = preparer.prepare([Image.open(io.BytesIO(file))])
            for source in (file, url(file)):
                pooled = await pool.prepare(source, name="it")
                assert_same(pooled.image, ours)
                assert pooled.decode_s > 0 and pooled.preprocess_s > 0
        assert ((await pool.prepare(files[7], name="it")).width, 80) == (60, 80)  # turned upright

    run(both())


def test_what_is_no_picture_is_refused_in_the_words_of_this_process(pool: PicturePool, preparer: ImagePreparer) -> None:
    whole = encoded(noise(0))
    bad: list[str | bytes] = [
        b"", b"<svg/>", whole[:300], "data:text/html;base64,aGk=", "data:image/png;base64,aGk", url(whole) + "é",
        encoded(Image.new("1", (5000, 4001))), encoded(Image.new("1", (20_000, 1))),
        encoded(Image.fromarray(np.full((2, 2), 7.5, np.float32)), "TIFF"),
    ]  # fmt: skip
    patterns = [
        "not a picture", "not a picture", "damaged or truncated", "must begin like data:image/png",
        "are not base64", "are not base64", "5000x4001 is 20005000 pixels; at most 20000000 are allowed",
        "is 20000 times longer than wide", "floating-point numbers, and not all in 0",
    ]  # fmt: skip
    for index, (text, pattern) in enumerate(zip(run(texts(pool, *bad)), patterns, strict=True)):
        assert re.match(rf"PictureError image {index}: .*{pattern}", text), text
    assert pool.num_restarts == 0


def test_200_pictures_at_once_come_back_each_to_its_own(pool: PicturePool, preparer: ImagePreparer) -> None:
    files = [encoded(noise(seed, size=(30 + seed % 7, 20))) for seed in range(200)]

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(pool.prepare(file, name="it") for file in files))

    for file, pooled in zip(files, run(all_of_them()), strict=True):
        (ours,) = preparer.prepare([Image.open(io.BytesIO(file))])
        assert_same(pooled.image, ours)


def test_memory_is_bounded_and_the_process_lives_on(pool: PicturePool) -> None:
    """A picture of 20 million pixels: 80 MB in PIL. Then files too large to be received, let alone to be decoded."""
    large = encoded(Image.new("RGB", (5000, 4000)))
    assert len(large) < 1 << 20
    sources = [large, url(large), bytes(70 << 20), encoded(noise(0)), "x" * (70 << 20), encoded(noise(0))]
    short = "PictureError image {}: decoding it needs more memory than media_worker_memory_mib allows"
    assert run(texts(pool, *sources)) == [short.format(0), short.format(1), short.format(2), "", short.format(4), ""]
    assert pool.num_restarts == 0


def test_a_source_that_is_too_long_is_not_even_sent(pool: PicturePool) -> None:
    too_long = f"bytes; at most {MAX_BYTES} are allowed"
    for text in run(texts(pool, bytes(MAX_BYTES + 1), "x" * (4 * MAX_BYTES // 3 + 100))):
        assert text.endswith(too_long)


def test_a_killed_process_fails_its_picture_alone_and_is_replaced(pool: PicturePool, preparer: ImagePreparer) -> None:
    before, file = pids_of(pool), encoded(noise(0))

    async def kill() -> None:
        for pid in before:
            os.kill(pid, signal.SIGSTOP)
        tasks = [asyncio.create_task(pool.prepare(file, name=f"image {index}")) for index in range(4)]
        await until(lambda: pool._jobs.qsize() == 2)
        await asyncio.sleep(0.1)
        os.kill(before[0], signal.SIGKILL)
        await until(lambda: any(task.done() for task in tasks))
        os.kill(before[1], signal.SIGCONT)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        lost = [str(result) for result in results if isinstance(result, PictureError)]
        assert len(lost) == 1
        assert re.fullmatch(r"image [01]: the process that decoded it was ended by signal 9", lost[0])
        (ours,) = preparer.prepare([Image.open(io.BytesIO(file))])
        for result in results:
            if not isinstance(result, BaseException):
                assert_same(result.image, ours)
        await until(lambda: pool.num_restarts == 1)

    run(kill())
    after = pids_of(pool)
    assert len(after) == 2
    assert not exists(before[0]) and before[1] in after


def test_nothing_of_a_picture_is_kept(pool: PicturePool) -> None:
    good, bad = encoded(noise(0)), b"no picture" * 10
    gc.disable()
    try:
        counts = sys.getrefcount(good), sys.getrefcount(bad)

        async def once() -> weakref.ref[np.ndarray]:
            with pytest.raises(PictureError):
                await pool.prepare(bad, name="it")
            return weakref.ref((await pool.prepare(good, name="it")).image.array)

        array = run(once())
        # The thread that delivered it may be about to let go of it.
        run(until(lambda: array() is None and (sys.getrefcount(good), sys.getrefcount(bad)) == counts))
    finally:
        gc.enable()


# --------------------------------------------------------------------------------------------- scripted processes


def test_a_picture_that_takes_too_long_is_given_up(scripted: Callable[..., PicturePool]) -> None:
    pool = scripted(timeout_s=0.8)
    gone = pids_of(pool)
    assert run(texts(pool, "sleep 60", "value 1", "signal 19", "value 1")) == [
        "PictureError image 0: decoding it took longer than 0.8 s and was given up",
        "",
        "PictureError image 2: decoding it took longer than 0.8 s and was given up",
        "",
    ]
    assert pool.num_restarts == 2
    assert not any(map(exists, gone))


def test_every_end_of_a_process_is_the_picture_that_it_had(scripted: Callable[..., PicturePool]) -> None:
    pool = scripted(num_workers=2)
    sources = ["value 1", "signal 11", "exit 1", "babble", "refuse", "value 2", "signal 6"] * 2
    lost = "the process that decoded it "
    expected = [
        None, lost + "was ended by signal 11", lost + "ended with exit code 1", lost + "gave no right answer",
        "refused", None, lost + "was ended by signal 6",
    ]  # fmt: skip
    for index, text in enumerate(run(texts(pool, *sources))):
        cause = expected[index % 7]
        assert text == ("" if cause is None else f"PictureError image {index}: {cause}")
    run(until_restarts(pool, 8))


async def until_restarts(pool: PicturePool, count: int) -> None:
    await until(lambda: pool.num_restarts == count)


def test_a_process_that_ends_while_idle_costs_no_picture(scripted: Callable[..., PicturePool]) -> None:
    pool = scripted(num_workers=2)
    for pid in pids_of(pool):
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert run(texts(pool, *["value 1"] * 6)) == [""] * 6
    run(until_restarts(pool, 2))


def test_a_picture_that_is_given_up_before_its_turn_is_not_begun(scripted: Callable[..., PicturePool]) -> None:
    pool = scripted()
    waiting = "signal 9" + " " * 500

    async def give_up() -> None:
        first = asyncio.create_task(pool.prepare("sleep 0.3", name="first"))
        second = asyncio.create_task(pool.prepare(waiting, name="second"))
        await asyncio.sleep(0.1)
        references = sys.getrefcount(waiting)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert sys.getrefcount(waiting) < references  # not even while it still stands in the queue
        third = await pool.prepare("value 3", name="third")
        assert third.image.array.max() == 3
        assert (await first).image.array.max() == 0

    run(give_up())
    assert pool.num_restarts == 0


def test_a_picture_that_is_given_up_in_work_is_decoded_for_nobody(scripted: Callable[..., PicturePool]) -> None:
    pool = scripted()

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.prepare("sleep 0.3", name="it"), 0.1)
        assert (await pool.prepare("value 2", name="it")).image.array.max() == 2

    run(give_up())
    assert pool.num_restarts == 0


def test_a_loop_that_is_gone_does_not_take_the_pool_along(scripted: Callable[..., PicturePool]) -> None:
    pool = scripted()

    async def leave() -> None:
        task = asyncio.create_task(pool.prepare("sleep 0.2", name="it"))
        await asyncio.sleep(0.05)
        assert not task.done()

    run(leave())
    assert run(texts(pool, "value 1")) == [""]


def test_processes_that_do_not_start_again_are_told_and_tried_on(
    scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_pool, "_FIRST_PAUSE_S", 0.05)
    pool = scripted()
    scripted.script(setup="os._exit(7)")
    first, *others = run(texts(pool, "exit 1", "value 1", "value 2"))
    refused = "pictures cannot be decoded: a picture process ended with exit code 7 before it was ready"
    assert first == "PictureError image 0: the process that decoded it ended with exit code 1"
    assert others == [f"RuntimeError {refused}"] * 2
    assert run(texts(pool, "value 1")) == [f"RuntimeError {refused}"]
    assert pool.num_restarts == 0
    scripted.script()
    run(until_restarts(pool, 1))
    assert run(texts(pool, "value 1")) == [""]


@pytest.mark.parametrize("num_waiting", [0, 3])
def test_closing_ends_what_is_in_work_and_what_waits(num_waiting: int, scripted: Callable[..., PicturePool]) -> None:
    pool = scripted(num_workers=2)
    pids = pids_of(pool)
    assert all(map(exists, pids))

    async def close() -> None:
        tasks = [asyncio.create_task(pool.prepare("sleep 60", name="it")) for _ in range(2 + num_waiting)]
        await asyncio.sleep(0.1)
        began = time.monotonic()
        pool.close()
        pool.close()
        assert time.monotonic() - began < 5
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert (type(result), str(result)) == (RuntimeError, "the picture pool is closed")
        with pytest.raises(RuntimeError, match="^the picture pool is closed$"):
            await pool.prepare("value 1", name="it")

    run(close())
    assert not any(map(exists, pids))
    assert not any(thread.is_alive() for thread in pool._threads)


def test_closing_does_not_wait_for_a_process_that_is_being_started(scripted: Any) -> None:
    pool = scripted()
    scripted.script(setup="time.sleep(60)")
    assert run(texts(pool, "exit 1")) == ["PictureError image 0: the process that decoded it ended with exit code 1"]
    run(until(lambda: bool(pids_of(pool))))
    pids, began = pids_of(pool), time.monotonic()
    pool.close()
    assert time.monotonic() - began < 5
    assert not any(map(exists, pids))


def test_a_pool_that_is_closed_while_it_starts_does_not_start(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[PictureClient] = []

    def client(*args: Any, **options: Any) -> PictureClient:
        made.append(PictureClient(*args, **options, program=scripted_program()))
        return made[-1]

    def await_ready(self: PictureClient, timeout_s: float) -> None:
        ready(self, timeout_s)
        pool.close()

    ready = PictureClient.await_ready
    monkeypatch.setattr(picture_pool, "PictureClient", client)
    monkeypatch.setattr(PictureClient, "await_ready", await_ready)
    pool = PicturePool(config, num_workers=1, memory_bytes=1, max_bytes=1)
    with pytest.raises(RuntimeError, match="^the picture pool is closed$"):
        pool.start()
    assert not any(exists(client.pid) for client in made)
    assert run(texts(pool, b"")) == ["RuntimeError the picture pool is closed"]


def test_a_start_that_fails_leaves_nothing(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[PictureClient] = []

    def client(*args: Any, **options: Any) -> PictureClient:
        # The first comes up, the second does not.
        first = 'messages.Broken("no file")' if made else "messages.Ready()"
        made.append(PictureClient(*args, **options, program=scripted_program(first=first)))
        return made[-1]

    monkeypatch.setattr(picture_pool, "PictureClient", client)
    pool = PicturePool(config, num_workers=2, memory_bytes=1, max_bytes=1)
    assert run(texts(pool, b"")) == ["RuntimeError the picture pool is not started"]
    with pytest.raises(RuntimeError, match="^a picture process cannot serve: no file$"):
        pool.start()
    assert len(made) == 2
    assert not any(exists(client.pid) for client in made)
    with pytest.raises(RuntimeError, match="started once"):
        pool.start()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disable_image_processor": True}, "disable_image_processor is set"),
        (
            {
                "image_input_type": "image_features", "image_token_id": 32000, "image_input_shape": (1, 3, 56, 56),
                "image_feature_size": 16,
            },
            "image_input_type = 'image_features'",
        ),
    ],
)  # fmt: skip
def test_a_configuration_without_pictures_has_no_pool(options: Any, message: str, tiny_facts: Path) -> None:
    config = EngineConfig.from_fields(model=str(tiny_facts), device="cpu", **options)
    with pytest.raises(ValueError, match=message):
        PicturePool(config, num_workers=1, memory_bytes=1, max_bytes=1)


@pytest.mark.parametrize("name", ["num_workers", "memory_bytes", "max_bytes", "timeout_s"])
def test_limits_must_be_above_0(name: str, config: EngineConfig) -> None:
    values: dict[str, Any] = {"num_workers": 1, "memory_bytes": 1, "max_bytes": 1, "timeout_s": 1.0, name: 0}
    with pytest.raises(ValueError, match=f"{name} = 0: must be above 0"):
        PicturePool(config, **values)
