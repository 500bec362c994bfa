"""Staged images, and their encoding on ranks that share the work and must agree about failures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_vlm.kernels.choice import choose
from dist_vlm.workers.comm import Communicator, single_rank
from dist_vlm.workers.encoder import NO_MEMORY, NOT_ENCODED, NOT_FINITE
from dist_vlm.workers.models import get_family, read_spec
from dist_vlm.workers.models.family import VisionModel
from dist_vlm.workers.plan import ImageFailure
from dist_vlm.workers.safetensors_source import SafetensorsSource
from dist_vlm.workers.vision import FeatureStore, ImageStore

from .thread_comm import on_ranks, thread_comms

CPU = torch.device("cpu")
PIXELS = np.full((1, 3, 2, 2), 2.0, np.float32)


class Tower(VisionModel):
    """Sums an image's pixels into two rows of four; fails on a negative sum, and has room for `room` images."""

    def __init__(self, room=100):
        self.room = room

    def encode_pixels(self, pixel_values):
        if len(pixel_values) > self.room:
            raise torch.cuda.OutOfMemoryError("no room")
        sums = pixel_values.sum(dim=(1, 2, 3))
        if (sums < 0).any():
            raise RuntimeError("CUDA error: out of luck")
        return sums[:, None, None].expand(-1, 2, 4)

    def project_features(self, features):
        return features * 10


class Blind(Tower):
    """Does not look at its sums, for which it would wait."""

    def encode_pixels(self, pixel_values):
        return pixel_values.sum(dim=(1, 2, 3))[:, None, None].expand(-1, 2, 4)


def run_ranks(world_size, work):
    comms = thread_comms(world_size)
    return on_ranks(comms, lambda rank: work(comms[rank]))


def store(comm, tower=None, *, batch_images=4, data_parallel=True):
    return FeatureStore(
        vision=tower or Tower(),
        comm=comm,
        dtype=torch.float32,
        device=CPU,
        hidden_size=4,
        batch_images=batch_images,
        data_parallel=data_parallel,
    )


def staged(**values):
    """An image of pixels for each number; a pair (value, rows) is one of features."""
    images = ImageStore()
    for key, value in values.items():
        if isinstance(value, tuple):
            images.stage(key, "image_features", np.full((1, value[1], 4), value[0], np.float32))
        else:
            images.stage(key, "pixel_values", PIXELS * value)
    return images


def held(features):
    return {key: rows.tolist() for key, rows in features.features.items()}


@pytest.mark.parametrize("data_parallel", [True, False])
@pytest.mark.parametrize("count", range(6))
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_ranks_hold_every_image_after_two_collectives_at_most(world_size, count, data_parallel):
    keys = tuple(f"i{n}" for n in range(count))

    def rank(comm):
        features = store(comm, data_parallel=data_parallel)
        assert features.encode(keys, staged(**{key: n for n, key in enumerate(keys)})) == ()
        return held(features), (comm.count.all_reduce, comm.count.all_gather), features.num_encoded

    split = data_parallel and world_size > 1 and count > 1
    results = run_ranks(world_size, rank)
    for found, collectives, _ in results:
        assert found == {key: [[24.0 * n] * 4] * 2 for n, key in enumerate(keys)}
        assert collectives == (int(count > 0 and world_size > 1), int(split))
    shares = [encoded for *_, encoded in results]
    assert sum(shares) == (count if split else count * world_size)
    assert max(shares) - min(shares) <= 1, "balanced"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_kinds_and_row_counts_may_differ(world_size):
    def rank(comm):
        features = store(comm)
        images = staged(a=1, b=(2, 5), c=3, d=(4, 1), e=(5, 2))
        assert features.encode(("d", "a", "b", "c", "e"), images) == ()
        return held(features)

    for found in run_ranks(world_size, rank):
        assert found == {
            "a": [[24.0] * 4] * 2,
            "b": [[20.0] * 4] * 5,
            "c": [[72.0] * 4] * 2,
            "d": [[40.0] * 4],
            "e": [[50.0] * 4] * 2,
        }


FAULTS = {
    "the exception of a batch": (-1, NOT_ENCODED),
    "not finite": (np.nan, NOT_FINITE),
    "not staged": (None, NOT_ENCODED),
}


def staged_with_fault(value):
    """Four images, of which `bad` has this value; it is not staged for None."""
    if value is None:
        return staged(good=1, fine=3, last=4)
    return staged(good=1, bad=value, fine=3, last=4)


@pytest.mark.parametrize("data_parallel", [True, False])
@pytest.mark.parametrize("guilty", [{0}, {1}, {2}, {0, 1, 2}], ids=str)
@pytest.mark.parametrize(("value", "reason"), FAULTS.values(), ids=FAULTS.keys())
def test_a_failure_is_the_same_on_all_ranks_and_strands_nobody(value, reason, guilty, data_parallel, caplog):
    """Image `bad` is damaged on the guilty ranks alone: rank 1 encodes it where the images are split."""

    def rank(comm):
        features = store(comm, data_parallel=data_parallel)
        images = staged_with_fault(value if comm.rank in guilty else 2)
        failures = features.encode(("good", "bad", "fine", "last"), images)
        again = features.encode(("good", "last"), images)
        return failures, again, held(features), comm.count.total

    fails = 1 in guilty or not data_parallel
    for failures, again, found, collectives in run_ranks(3, rank):
        assert failures == ((ImageFailure("bad", reason),) if fails else ())
        assert again == ()
        assert found["good"] == [[24.0] * 4] * 2 and found["fine"] == [[72.0] * 4] * 2
        assert found["last"] == [[96.0] * 4] * 2 and ("bad" in found) == (not fails)
        assert collectives == (4 if data_parallel else 2)
    # The library's own words stay in the log.
    assert ("out of luck" in caplog.text) == (fails and value == -1)


def test_where_ranks_give_several_reasons_all_choose_the_same():
    def rank(comm):
        features = store(comm, Tower(room=0 if comm.rank == 0 else 1), data_parallel=False)
        return features.encode(("a",), staged(a=-1 if comm.rank == 1 else 1))

    assert run_ranks(3, rank) == [(ImageFailure("a", NOT_ENCODED),)] * 3


@pytest.mark.parametrize("data_parallel", [True, False])
def test_a_rank_without_memory_for_one_image_fails_what_it_was_to_encode(data_parallel):
    def rank(comm):
        features = store(comm, Tower(room=comm.rank), data_parallel=data_parallel)  # rank 0 has none
        failures = features.encode(("a", "b", "c"), staged(a=1, b=2, c=3))
        return failures, held(features)

    for failures, found in run_ranks(2, rank):
        if data_parallel:
            assert failures == (ImageFailure("a", NO_MEMORY), ImageFailure("c", NO_MEMORY))
            assert found == {"b": [[48.0] * 4] * 2}
        else:
            assert failures == tuple(ImageFailure(key, NO_MEMORY) for key in "abc")
            assert found == {}


def test_where_all_images_fail_nothing_is_gathered():
    def rank(comm):
        features = store(comm)
        failures = features.encode(("a", "b"), staged(a=-1, b=-1))
        return failures, comm.count.all_gather, features.features

    expected = tuple(ImageFailure(key, NOT_ENCODED) for key in "ab")
    assert run_ranks(2, rank) == [(expected, 0, {})] * 2


def test_a_failed_image_leaves_no_older_features():
    def rank(comm):
        features, images = store(comm), staged(a=1)
        features.encode(("a",), images)
        images.stage("a", "pixel_values", -PIXELS)
        features.encode(("a",), images)
        return features.features

    assert run_ranks(2, rank) == [{}, {}]


@pytest.mark.parametrize("world_size", [1, 2])
def test_features_are_dropped_with_their_memory(world_size):
    def rank(comm):
        features = store(comm)
        features.encode(("a", "b", "c"), staged(a=1, b=2, c=3))
        features.drop(("a", "never held"))
        return {key: rows.untyped_storage().nbytes() for key, rows in features.features.items()}

    for sizes in run_ranks(world_size, rank):
        assert sizes == {"b": 2 * 4 * 4, "c": 2 * 4 * 4}


def test_a_staged_array_is_never_written_to():
    def rank(comm):
        features, images, array = store(comm), ImageStore(), PIXELS.copy()
        array.flags.writeable = False
        images.stage("a", "pixel_values", array)
        return features.encode(("a",), images), array.tolist()

    assert run_ranks(1, rank) == [((), PIXELS.tolist())]


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    """(vision model in float32, images, features of each encoded alone)."""
    spec = read_spec(str(tiny_checkpoint))
    family = get_family(spec.family)
    vision = family.build_vision(spec, ops=choose("torch", CPU), dtype=torch.float32, device=CPU)
    with SafetensorsSource(spec.path) as source:
        family.load_vision(vision, spec, source)
    draw = torch.Generator().manual_seed(0)
    pixels = {f"i{n}": torch.randn(spec.image_input_shape, generator=draw) for n in range(5)}
    with torch.inference_mode():
        alone = {key: vision.encode_pixels(image)[0] for key, image in pixels.items()}
    return spec, vision, pixels, alone


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_checkpoints_images_get_the_features_they_get_alone(tiny, world_size):
    spec, vision, pixels, alone = tiny

    def rank(comm):
        images = ImageStore()
        for key, image in pixels.items():
            images.stage(key, "pixel_values", image.numpy())
        features = FeatureStore(
            vision=vision,
            comm=comm,
            dtype=torch.float32,
            device=CPU,
            hidden_size=spec.hidden_size,
            batch_images=2,
            data_parallel=True,
        )
        assert features.encode(tuple(pixels), images) == ()
        return features.features

    results = run_ranks(world_size, rank)
    for key, expected in alone.items():
        torch.testing.assert_close(results[0][key], expected, atol=1e-5, rtol=1e-5)
        assert all(torch.equal(found[key], results[0][key]) for found in results), "the same bits on every rank"


@pytest.mark.gpu
def test_a_gpu_gets_its_images_through_pinned_memory():
    def rank(comm):
        features = FeatureStore(
            vision=Tower(room=2),
            comm=comm,
            dtype=torch.bfloat16,
            device=torch.device("cuda"),
            hidden_size=4,
            batch_images=4,
            data_parallel=True,
        )
        failures = features.encode(tuple("abcde"), staged(a=1, b=2, c=-1, d=(4, 3), e=5))
        return failures, held(features)

    for failures, found in run_ranks(2, rank):
        assert failures == (ImageFailure("c", NOT_ENCODED),)
        assert found == {
            "a": [[24.0] * 4] * 2,
            "b": [[48.0] * 4] * 2,
            "d": [[40.0] * 4] * 3,
            "e": [[120.0] * 4] * 2,
        }


@pytest.mark.gpu
def test_a_gpu_that_is_full_encodes_in_smaller_batches():
    """A real lack of memory: the tower wants 20 % of the GPU for each image and a batch of eight."""

    class Hungry(Tower):
        def __init__(self):
            super().__init__()
            self.batches = []

        def encode_pixels(self, pixel_values):
            self.batches.append(len(pixel_values))
            share = torch.cuda.get_device_properties(0).total_memory // 5
            scratch = torch.empty(len(pixel_values) * share, dtype=torch.uint8, device="cuda")
            assert scratch.is_cuda
            return super().encode_pixels(pixel_values)

    def rank(comm):
        tower = Hungry()
        features = FeatureStore(
            vision=tower,
            comm=comm,
            dtype=torch.float32,
            device=torch.device("cuda"),
            hidden_size=4,
            batch_images=8,
            data_parallel=True,
        )
        keys = tuple(f"i{n}" for n in range(8))
        return features.encode(keys, staged(**{key: n for n, key in enumerate(keys)})), tower.batches, held(features)

    failures, batches, found = run_ranks(1, rank)[0]
    assert failures == () and batches[:2] == [8, 4] and max(batches[2:]) <= 4
    assert found == {f"i{n}": [[24.0 * n] * 4] * 2 for n in range(8)}


ROWS = dict.fromkeys(("good", "bad", "fine", "last"), 2)


@pytest.mark.parametrize("data_parallel", [True, False])
@pytest.mark.parametrize("guilty", [set(), {0}, {1}, {2}, {0, 1, 2}], ids=str)
@pytest.mark.parametrize(("value", "reason"), FAULTS.values(), ids=FAULTS.keys())
def test_what_fails_may_be_told_later_and_every_rank_holds_every_image_until_then(value, reason, guilty, data_parallel):
    """As above, but that no rank waits: a failed image has features of the right shape on all ranks."""

    def rank(comm):
        features = store(comm, data_parallel=data_parallel)
        images = staged_with_fault(value if comm.rank in guilty else 2)
        verdict = features.encode_later(("good", "bad", "fine", "last"), images, ROWS)
        shapes = {key: rows.shape for key, rows in features.features.items()}
        one = features.encode_later(("last",), images, ROWS)
        failures = verdict.to_host().failures(), one.failures()
        count = (comm.count.all_reduce, comm.count.all_gather)
        features.drop(["bad"])
        return failures, shapes, held(features), count

    fails = 1 in guilty or (guilty and not data_parallel)
    expected = (ImageFailure("bad", reason),) if fails else ()
    for failures, shapes, found, count in run_ranks(3, rank):
        assert failures == (expected, ())
        assert shapes == dict.fromkeys(ROWS, (2, 4))
        assert found == {"good": [[24.0] * 4] * 2, "fine": [[72.0] * 4] * 2, "last": [[96.0] * 4] * 2}
        assert count == (2, int(data_parallel))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_told_later_features_are_those_told_at_once(world_size):
    def rank(comm):
        now, later = store(comm), store(comm)
        images, keys = staged(a=1, b=(2, 5), c=3, d=(4, 1), e=(5, 2)), ("d", "a", "b", "c", "e")
        assert now.encode(keys, images) == ()
        rows = {"a": 2, "b": 5, "c": 2, "d": 1, "e": 2}
        assert later.encode_later(keys, images, rows).failures() == ()
        return held(now), held(later)

    for now, later in run_ranks(world_size, rank):
        assert later == now


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_image_of_other_rows_than_its_positions_fails(world_size):
    def rank(comm):
        features = store(comm)
        verdict = features.encode_later(("a", "b"), staged(a=1, b=(2, 5)), {"a": 2, "b": 3})
        return verdict.failures(), held(features)

    for failures, found in run_ranks(world_size, rank):
        assert failures == (ImageFailure("b", NOT_ENCODED),)
        assert found == {"a": [[24.0] * 4] * 2, "b": [[0.0] * 4] * 3}


def test_without_images_there_is_nothing_to_tell():
    features = store(Communicator(0, 2))  # a collective would fail
    assert features.encode_later((), ImageStore(), {}) is None


def test_an_older_verdict_says_nothing_of_features_encoded_since():
    features = store(single_rank())
    verdict = features.encode_later(("x",), staged(x=np.nan), {"x": 2})
    features.encode(("x",), staged(x=1))
    assert verdict.failures() == (ImageFailure("x", NOT_FINITE),)
    assert held(features) == {"x": [[24.0] * 4] * 2}


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for():
    features = FeatureStore(
        vision=Blind(),
        comm=single_rank(),
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        hidden_size=4,
        batch_images=4,
        data_parallel=True,
    )
    images, rows = staged(a=1, b=2, d=(np.nan, 3)), {"a": 2, "b": 2, "c": 7, "d": 3}
    features.encode_later(("a", "b", "c", "d"), images, rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        verdict = features.encode_later(("a", "b", "c", "d"), images, rows).to_host()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert verdict.failures() == (ImageFailure("c", NOT_ENCODED), ImageFailure("d", NOT_FINITE))
    assert [rows.shape[0] for rows in features.features.values()] == [2, 2, 7, 3]
