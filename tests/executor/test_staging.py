"""How an image travels to ranks on another machine: through the object store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ray

from dist_vlm.executor.base import StagedImage
from dist_vlm.executor.ray_cluster import RayCluster
from dist_vlm.executor.staging import ImageStaging

# More than Ray sends with a call.
PIXELS = np.random.default_rng(0).integers(0, 256, (1, 3, 340, 336), dtype=np.uint8)

Make = Callable[..., tuple[ImageStaging, list[Any]]]


@ray.remote(concurrency_groups={"staging": 1})
class Holder:
    """A rank that keeps what it is given, and says what it keeps."""

    def __init__(self) -> None:
        self.held: dict[str, np.ndarray] = {}

    def stage(self, key: str, kind: str, array: np.ndarray) -> None:
        if kind == "bad":
            raise ValueError("no room")
        self.held[key] = array

    def unstage(self, key: str) -> None:
        del self.held[key]

    def facts(self) -> dict[str, tuple[int, bool]]:
        return {key: (int(array.sum(dtype=np.int64)), array.flags.writeable) for key, array in self.held.copy().items()}


@pytest.fixture
def make(shared_ray: RayCluster) -> Iterator[Make]:
    opened: list[tuple[ImageStaging, list[Any]]] = []

    def begin(ranks: int) -> tuple[ImageStaging, list[Any]]:
        actors = [Holder.options(num_cpus=0).remote() for _ in range(ranks)]
        ray.get([actor.facts.remote() for actor in actors])
        opened.append((ImageStaging(actors), actors))
        return opened[-1]

    yield begin
    for staging, actors in opened:
        staging.close()
        for actor in actors:
            ray.kill(actor)


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what goes into the object store by itself."""
    sizes: list[int] = []
    before = ray.put

    def counted(array: np.ndarray) -> Any:
        sizes.append(array.nbytes)
        return before(array)

    monkeypatch.setattr(ray, "put", counted)
    return sizes


def staged(staging: ImageStaging, count: int) -> list[StagedImage]:
    images: list[StagedImage] = []
    end = time.monotonic() + 20
    while len(images) < count:
        assert time.monotonic() < end, "an image is not answered for"
        images += staging.poll()
        time.sleep(0.001)
    return sorted(images, key=lambda image: image.key)


def total(array: np.ndarray) -> tuple[int, bool]:
    return int(array.sum(dtype=np.int64)), False


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_image_is_put_into_the_object_store_once(ranks: int, make: Make, put: list[int]) -> None:
    staging, actors = make(ranks)
    staging.stage("a", "coded_pixels", PIXELS)
    assert staged(staging, 1) == [StagedImage("a", None)]
    assert put == [PIXELS.nbytes]
    assert ray.get([actor.facts.remote() for actor in actors]) == [{"a": total(PIXELS)}] * ranks


def test_what_the_object_store_does_not_take_is_reported_and_can_come_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(array: np.ndarray) -> None:
        raise MemoryError("the store is full")

    staging, _ = make(1)
    with monkeypatch.context() as patched:
        patched.setattr(ray, "put", full)
        staging.stage("a", "coded_pixels", PIXELS)
        assert staged(staging, 1) == [StagedImage("a", "MemoryError: the store is full")]
    staging.unstage("a")
    staging.stage("a", "coded_pixels", PIXELS)
    assert staged(staging, 1) == [StagedImage("a", None)]


def test_a_wait_ends_with_news_and_without_at_its_time(make: Make) -> None:
    staging, _ = make(2)
    began = time.monotonic()
    staging.wait(0.05)
    assert time.monotonic() - began > 0.04
    staging.stage("a", "coded_pixels", PIXELS)
    images: list[StagedImage] = []
    for _ in range(5):  # the call, an answer a rank
        staging.wait(20)
        images += staging.poll()
        if images:
            break
    assert images == [StagedImage("a", None)]
    assert time.monotonic() - began < 15


def test_one_that_was_sent_can_leave_come_again_and_fail(make: Make) -> None:
    staging, (actor,) = make(1)
    for shift in range(4):
        array = PIXELS + np.uint8(shift)
        staging.stage("a", "coded_pixels", array)
        assert staged(staging, 1) == [StagedImage("a", None)]
        assert ray.get(actor.facts.remote()) == {"a": total(array)}
        staging.unstage("a")
    staging.stage("a", "bad", PIXELS)
    (image,) = staged(staging, 1)
    assert image.error is not None and "no room" in image.error
    with pytest.raises(ValueError, match="'a' is staged already"):
        staging.stage("a", "coded_pixels", PIXELS)
    with pytest.raises(ValueError, match="'b' is not staged"):
        staging.unstage("b")
