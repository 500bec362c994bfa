"""Batches of one rank's encoder, and what is left of them when memory or an image fails."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_vlm.workers.coded_pixels import blank_coded, places_of
from dist_vlm.workers.encoder import NO_MEMORY, NOT_ENCODED, NOT_FINITE, ImageEncoder, StagedImage
from dist_vlm.workers.models.family import VisionModel

MORE_THAN_THERE_IS = 1 << 52


class Tower(VisionModel):
    """Rows [2, 3] of an image's sum; notes batch sizes. Fails as told by the `poison` in an image's first pixel."""

    def __init__(self, *, room=1000, allocate=lambda: torch.empty(MORE_THAN_THERE_IS)):
        self.room = room
        self.allocate = allocate
        self.batches = []

    def encode_pixels(self, pixel_values):
        self.batches.append(len(pixel_values))
        if len(pixel_values) > self.room:
            self.allocate()
        if (pixel_values[:, 0, 0, 0] == -1).any():
            raise ZeroDivisionError("one of them is bad")
        if (pixel_values[:, 0, 0, 0] == -2).any():
            self.allocate()
        return pixel_values.sum(dim=(1, 2, 3))[:, None, None].expand(-1, 2, 3)

    def project_features(self, features):
        self.batches.append(len(features))
        return features[..., :3] * 10


def image(name, value, *, kind="pixel_values", rows=2):
    shape = (1, 3, 2, 2) if kind == "pixel_values" else (1, rows, 4)
    array = np.full(shape, value, np.float32)
    array.flags.writeable = False
    return StagedImage(name, kind, array)


def encoder(tower, batch_images=4):
    return ImageEncoder(vision=tower, dtype=torch.float32, device=torch.device("cpu"), batch_images=batch_images)


def expected(value):
    return torch.full((2, 3), 12.0 * value)


@pytest.mark.parametrize(("count", "batches"), [(0, []), (1, [1]), (4, [4]), (5, [4, 1]), (9, [4, 4, 1])])
def test_images_are_encoded_in_batches_of_the_given_size(count, batches):
    tower = Tower()
    work = encoder(tower)
    done = work.encode([image(f"i{n}", n) for n in range(count)])
    assert tower.batches == batches
    assert done.failed == {}
    assert list(done.features) == [f"i{n}" for n in range(count)]
    assert all(torch.equal(done.features[f"i{n}"], expected(n)) for n in range(count))
    assert work.num_encoded == count


def test_kinds_and_shapes_are_batched_apart():
    tower = Tower()
    images = [
        image("a", 1),
        image("b", 2, kind="image_features"),
        image("c", 3),
        image("d", 4, kind="image_features", rows=5),
        image("e", 5, kind="image_features"),
    ]
    done = encoder(tower).encode(images)
    assert sorted(tower.batches) == [1, 2, 2]
    assert torch.equal(done.features["a"], expected(1)) and torch.equal(done.features["c"], expected(3))
    assert torch.equal(done.features["b"], torch.full((2, 3), 20.0))
    assert torch.equal(done.features["d"], torch.full((5, 3), 40.0))
    assert torch.equal(done.features["e"], torch.full((2, 3), 50.0))


def test_an_images_features_keep_no_memory_of_its_batch():
    done = encoder(Tower()).encode([image("a", 1), image("b", 2)])
    assert done.features["a"].untyped_storage().nbytes() == 2 * 3 * 4


def numpy_allocation():
    np.empty(MORE_THAN_THERE_IS)


def cuda_allocation():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def library_allocation():
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


ALLOCATIONS = [lambda: torch.empty(MORE_THAN_THERE_IS), numpy_allocation, cuda_allocation, library_allocation]


@pytest.mark.parametrize("allocate", ALLOCATIONS, ids=["torch", "numpy", "cuda", "library"])
@pytest.mark.parametrize(
    ("room", "batches"), [(4, [8, 4, 4]), (3, [8, 4, 2, 2, 2, 2]), (1, [8, 4, 2] + 8 * [1])], ids=str
)
def test_a_lack_of_memory_halves_the_batch_and_those_after_it(room, batches, allocate):
    tower = Tower(room=room, allocate=allocate)
    done = encoder(tower, batch_images=8).encode([image(f"i{n}", n) for n in range(8)])
    assert tower.batches == batches
    assert done.failed == {}
    assert all(torch.equal(done.features[f"i{n}"], expected(n)) for n in range(8))


def test_the_next_call_tries_the_full_batch_again():
    tower = Tower(room=1)
    work = encoder(tower, batch_images=2)
    work.encode([image("a", 1), image("b", 2)])
    tower.room, tower.batches = 2, []
    assert len(work.encode([image("a", 1), image("b", 2)]).features) == 2
    assert tower.batches == [2]


def test_an_image_alone_too_large_for_memory_fails_and_says_so():
    done = encoder(Tower()).encode([image("a", 1), image("huge", -2), image("c", 3)])
    assert done.failed == {"huge": NO_MEMORY}
    assert torch.equal(done.features["a"], expected(1)) and torch.equal(done.features["c"], expected(3))


@pytest.mark.parametrize("guilty", [{0}, {3}, {6}, {1, 2}, {0, 6}, set(range(7))], ids=str)
def test_a_guilty_image_is_found_by_halving_and_fails_alone(guilty, caplog):
    tower = Tower()
    work = encoder(tower, batch_images=8)
    done = work.encode([image(f"i{n}", -1 if n in guilty else n) for n in range(7)])
    assert done.failed == {f"i{n}": NOT_ENCODED for n in guilty}
    assert {key: rows.tolist() for key, rows in done.features.items()} == {
        f"i{n}": expected(n).tolist() for n in range(7) if n not in guilty
    }
    assert "one of them is bad" in caplog.text, "the cause is in the log"
    assert work.num_encoded == 7 - len(guilty)
    if len(guilty) == 1:
        assert len(tower.batches) <= 7, "one of seven: at most 1 + 2 x 3 batches"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_fail_their_image(value):
    done = encoder(Tower()).encode([image("a", 1), image("b", value), image("c", 3)])
    assert done.failed == {"b": NOT_FINITE}
    assert sorted(done.features) == ["a", "c"]


def test_an_array_that_is_none_fails_alone():
    bad = StagedImage("bad", "pixel_values", np.full((1, 3, 2, 2), 1j))
    done = encoder(Tower()).encode([image("a", 1), bad])
    assert done.failed == {"bad": NOT_ENCODED}
    assert torch.equal(done.features["a"], expected(1))


def test_what_is_no_exception_of_an_image_goes_through():
    class Interrupted(Tower):
        def encode_pixels(self, pixel_values):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoder(Interrupted()).encode([image("a", 1)])


def test_a_batch_holds_at_least_one_image():
    with pytest.raises(ValueError, match="batch_images = 0: must be at least 1"):
        encoder(Tower(), batch_images=0)


def coded(name, value):
    """A picture of one number, written as the byte 7."""
    numbers = np.zeros((3, 256), np.float32)
    numbers[:, 7] = value
    array = blank_coded(numbers, height=2, width=2)
    places_of(array)[:] = 7
    array.flags.writeable = False
    return StagedImage(name, "coded_pixels", array)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coded_pixels_reach_the_tower_as_what_they_stand_for(dtype):
    tower = Tower()
    work = ImageEncoder(vision=tower, dtype=dtype, device=torch.device("cpu"), batch_images=4)
    done = work.encode([coded("a", 1.5), image("b", 2.0), coded("c", -0.25), coded("d", 3.0)])
    assert (tower.batches, done.failed) == ([3, 1], {})
    for name, value in (("a", 1.5), ("b", 2.0), ("c", -0.25), ("d", 3.0)):
        torch.testing.assert_close(done.features[name], expected(value).to(dtype))


def test_coded_pixels_without_a_whole_table_fail_alone():
    broken = StagedImage("broken", "coded_pixels", np.zeros((1, 3, 511, 2), np.uint8))
    done = encoder(Tower()).encode([coded("a", 1.0), broken, coded("b", -1.0), coded("c", 2.0)])
    assert done.failed == {"broken": NOT_ENCODED, "b": NOT_ENCODED}
    assert sorted(done.features) == ["a", "c"]
