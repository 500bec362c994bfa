"""Staged images, and their encoding on ranks that must agree about failures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_vlm.workers.models.family import VisionModel
from dist_vlm.workers.plan import ImageFailure
from dist_vlm.workers.vision import FeatureStore, ImageStore

from .thread_comm import on_ranks, thread_comms

PIXELS = np.full((1, 3, 2, 2), 2.0, np.float32)


class Tower(VisionModel):
    """Sums an image's pixels into two rows; fails on a negative one."""

    def encode_pixels(self, pixel_values):
        if pixel_values.min() < 0:
            raise RuntimeError("CUDA error: out of luck")
        return pixel_values.sum().expand(1, 2, 4)

    def project_features(self, features):
        return features * 10


def run_ranks(world_size, work):
    comms = thread_comms(world_size)
    return on_ranks(comms, lambda rank: work(comms[rank]))


def stores(comm, *keys):
    images = ImageStore()
    for key in keys:
        images.stage(key, "pixel_values", PIXELS)
    return FeatureStore(vision=Tower(), comm=comm, dtype=torch.float32, device=torch.device("cpu")), images


def test_each_kind_enters_at_its_own_stage():
    def rank(comm):
        features, images = stores(comm, "a")
        images.stage("b", "image_features", np.ones((1, 2, 4), np.float32))
        assert features.encode(("a", "b"), images) == ()
        assert comm.count.total == (1 if comm.world_size > 1 else 0), "one vote"
        return features.features

    for world_size in (1, 2):
        for found in run_ranks(world_size, rank):
            assert torch.equal(found["a"], torch.full((2, 4), 24.0))
            assert torch.equal(found["b"], torch.full((2, 4), 10.0))


def test_nothing_to_encode_is_no_vote():
    def rank(comm):
        features, images = stores(comm)
        assert features.encode((), images) == ()
        return comm.count.total

    assert run_ranks(2, rank) == [0, 0]


@pytest.mark.parametrize("guilty", [0, 1])
def test_a_failure_on_one_rank_is_a_failure_on_all_and_strands_nobody(guilty, caplog):
    def rank(comm):
        features, images = stores(comm, "good", "bad")
        if comm.rank == guilty:
            images.stage("bad", "pixel_values", -PIXELS)
        failures = features.encode(("bad", "good"), images)
        return failures, sorted(features.features)

    for failures, held in run_ranks(2, rank):
        # The library's own words stay in the log.
        assert failures == (ImageFailure("bad", "the image could not be encoded"),)
        assert held == ["good"]
    assert "out of luck" in caplog.text


def test_a_staged_array_is_never_written_to():
    def rank(comm):
        features, images = stores(comm)
        array = PIXELS.copy()
        array.flags.writeable = False
        images.stage("a", "pixel_values", array)
        features.encode(("a",), images)
        features.drop(("a",))
        images.unstage("a")
        return features.features

    assert run_ranks(1, rank) == [{}]
