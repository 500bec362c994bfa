"""How an image travels to ranks on the driver's machine: in memory without a name, through sockets."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import ray
from processes import stop

from dist_vlm.executor.base import StagedImage
from dist_vlm.executor.shared_staging import SharedStaging
from dist_vlm.executor.transport import TransportClosedError
from dist_vlm.workers.failure import RankError
from dist_vlm.workers.take_images import take_images

pytestmark = pytest.mark.usefixtures("shared_ray")

PIXELS = np.random.default_rng(0).integers(0, 256, (1, 3, 340, 336), dtype=np.uint8)

Make = Callable[..., tuple[SharedStaging, list[Any]]]


@ray.remote(concurrency_groups={"staging": 1})
class Holder:
    """A rank that keeps what it is given, and says what it keeps and what it was asked."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.held: dict[str, np.ndarray] = {}
        self.asked: list[str] = []

    def take_images(self, path: str, token: str) -> None:
        take_images(self.stage, self.unstage, rank=self.rank, path=path, token=token)

    def stage(self, key: str, kind: str, array: np.ndarray) -> None:
        self.asked.append(f"+{key}")
        if kind == "image_features" and self.rank == 1:
            raise RankError(1, "stage", "ValueError: no room")
        self.held[key] = array

    def unstage(self, key: str) -> None:
        self.asked.append(f"-{key}")
        del self.held[key]

    def facts(self) -> dict[str, tuple[int, tuple[int, ...], str, bool]]:
        return {
            key: (int(array.sum(dtype=np.int64)), array.shape, str(array.dtype), array.flags.writeable)
            for key, array in self.held.copy().items()  # another thread takes and forgets
        }

    def history(self) -> list[str]:
        return self.asked

    def pid(self) -> int:
        return os.getpid()


@pytest.fixture
def make() -> Iterator[Make]:
    opened: list[tuple[SharedStaging, list[Any]]] = []

    def begin(ranks: int) -> tuple[SharedStaging, list[Any]]:
        actors = [Holder.options(num_cpus=0).remote(rank) for rank in range(ranks)]
        opened.append((SharedStaging(actors), actors))
        return opened[-1]

    yield begin
    for staging, actors in opened:
        staging.close()
        for actor in actors:
            ray.kill(actor)


def staged(staging: SharedStaging, count: int) -> list[StagedImage]:
    images: list[StagedImage] = []
    end = time.monotonic() + 20
    while len(images) < count:
        assert time.monotonic() < end, "an image is not answered for"
        staging.wait(1.0)
        images += staging.poll()
    return images


def memory_held() -> int:
    """Of this process's descriptors, how many are of an image's memory."""
    targets = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            targets.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sum("memfd:image" in target for target in targets)


def told(array: np.ndarray) -> tuple[int, tuple[int, ...], str, bool]:
    return int(array.sum(dtype=np.int64)), array.shape, str(array.dtype), False


@pytest.mark.parametrize("ranks", [1, 3])
def test_an_image_reaches_every_rank_as_it_is(ranks: int, make: Make) -> None:
    staging, actors = make(ranks)
    images = {
        "a": PIXELS,
        "b": PIXELS.astype(np.float32),
        "turned": PIXELS.transpose(0, 1, 3, 2),
        "empty": np.zeros((1, 0, 4), np.float32),
        "large": np.ones((1, 3, 1500, 1500), np.float32),
    }
    for key, array in images.items():
        staging.stage(key, "pixel_values", array)
    assert staged(staging, 5) == [StagedImage(key, None) for key in images]
    assert staging.poll() == []
    assert (
        ray.get([actor.facts.remote() for actor in actors])
        == [{key: told(array) for key, array in images.items()}] * ranks
    )


def test_memory_is_used_again_and_goes_with_the_staging(make: Make) -> None:
    before = memory_held()
    staging, actors = make(2)
    for number in range(30):  # alternately longer and shorter
        array = np.full((1, 3, 100 + 50 * (number % 2), 300), number, np.uint8)
        staging.stage(str(number), "coded_pixels", array)
        assert staged(staging, 1) == [StagedImage(str(number), None)]
        assert memory_held() == before + 1
    assert ray.get(actors[1].facts.remote())["28"] == (28 * 90_000, (1, 3, 100, 300), "uint8", False)
    keys = [f"more {number}" for number in range(40)]
    for key in keys:
        staging.stage(key, "coded_pixels", PIXELS)
    assert staged(staging, len(keys)) == [StagedImage(key, None) for key in keys]
    assert memory_held() <= before + 4
    facts = ray.get([actor.facts.remote() for actor in actors])
    assert all(fact[key] == told(PIXELS) for fact in facts for key in keys)
    staging.close()
    staging._free.clear()
    assert memory_held() == before


def test_one_can_leave_come_again_and_fail(make: Make) -> None:
    staging, actors = make(2)
    for shift in range(4):
        array = PIXELS + np.uint8(shift)
        staging.stage("a", "coded_pixels", array)
        assert staged(staging, 1) == [StagedImage("a", None)]
        assert ray.get([actor.facts.remote() for actor in actors]) == [{"a": told(array)}] * 2
        staging.unstage("a")
    staging.stage("a", "image_features", PIXELS)
    assert staged(staging, 1) == [StagedImage("a", "rank 1: ValueError: no room")]
    with pytest.raises(ValueError, match="'a' is staged already"):
        staging.stage("a", "coded_pixels", PIXELS)
    with pytest.raises(ValueError, match="'b' is not staged"):
        staging.unstage("b")
    staging.unstage("a")  # which rank 1 does not have
    staging.stage("a", "coded_pixels", PIXELS)
    assert staged(staging, 1) == [StagedImage("a", None)]


def test_a_rank_that_takes_nothing_for_a_while_holds_nothing_up_and_gets_all_in_order(make: Make) -> None:
    before = memory_held()
    staging, actors = make(2)
    pid = ray.get(actors[1].pid.remote())
    stop(pid)
    try:
        began = time.monotonic()
        keys = [str(number) for number in range(100)]
        for key in keys:
            staging.stage(key, "coded_pixels", PIXELS)
        for key in keys[::3]:
            staging.unstage(key)
        assert staging.poll() == []
        assert time.monotonic() - began < 2
        assert memory_held() <= before + 16
    finally:
        os.kill(pid, signal.SIGCONT)
    left = [key for key in keys if int(key) % 3]
    assert staged(staging, len(left)) == [StagedImage(key, None) for key in left]
    staging.stage("last", "coded_pixels", PIXELS)  # behind all that is to be forgotten
    assert staged(staging, 1) == [StagedImage("last", None)]
    assert ray.get([actor.facts.remote() for actor in actors]) == [dict.fromkeys([*left, "last"], told(PIXELS))] * 2
    histories = ray.get([actor.history.remote() for actor in actors])
    assert histories[0] == histories[1]
    # What was forgotten before it was sent is not sent at all.
    assert sum(asked.startswith("-") for asked in histories[0]) < 10


def test_one_that_is_forgotten_on_its_way_is_not_reported(make: Make) -> None:
    staging, actors = make(1)
    staging.stage("a", "coded_pixels", PIXELS)
    staging.unstage("a")
    staging.stage("a", "coded_pixels", PIXELS + np.uint8(1))
    assert staged(staging, 1) == [StagedImage("a", None)]
    time.sleep(0.1)
    assert staging.poll() == []
    assert ray.get(actors[0].facts.remote()) == {"a": told(PIXELS + np.uint8(1))}


def test_all_that_is_to_be_forgotten_is_though_no_image_comes_and_nobody_polls(make: Make) -> None:
    staging, actors = make(2)
    keys = [str(number) for number in range(300)]
    small = np.ones((1, 3, 2, 2), np.uint8)
    for key in keys:
        staging.stage(key, "coded_pixels", small)
    assert len(staged(staging, len(keys))) == len(keys)
    pid = ray.get(actors[1].pid.remote())
    stop(pid)
    try:
        for key in keys:
            staging.unstage(key)
    finally:
        os.kill(pid, signal.SIGCONT)
    end = time.monotonic() + 20
    while ray.get([actor.facts.remote() for actor in actors]) != [{}, {}]:
        assert time.monotonic() < end, "images are still there"
        staging.advance()
    histories = ray.get([actor.history.remote() for actor in actors])
    assert histories == [[f"{sign}{key}" for sign in "+-" for key in keys]] * 2


def test_a_wait_without_news_ends_at_its_time(make: Make) -> None:
    staging, _ = make(2)
    began = time.monotonic()
    staging.wait(0.1)
    assert 0.08 < time.monotonic() - began < 5


def test_a_rank_that_ends_is_no_images_fault(make: Make) -> None:
    staging, actors = make(2)
    pid = ray.get(actors[1].pid.remote())
    stop(pid)
    staging.stage("a", "coded_pixels", PIXELS)
    os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 20
    with pytest.raises(TransportClosedError):
        while time.monotonic() < end:
            staging.wait(0.1)
            assert staging.poll() == []


def test_one_that_was_closed_takes_nothing(make: Make) -> None:
    staging, _ = make(1)
    staging.close()
    staging.close()
    staging.wait(0.01)
    with pytest.raises(TransportClosedError):
        staging.stage("a", "coded_pixels", PIXELS)
    with pytest.raises(TransportClosedError):
        staging.poll()
