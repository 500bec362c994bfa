import dataclasses

import numpy as np
import pytest
import torch

from dist_vlm.kernels.choice import choose
from dist_vlm.workers.comm import single_rank
from dist_vlm.workers.memory import (
    activation_bytes,
    arena_bytes,
    encoder_batch_images,
    image_bytes,
    kv_cache_bytes,
    recorded_bytes,
    vision_arena_bytes,
)
from dist_vlm.workers.models import get_family, read_spec
from dist_vlm.workers.peak_memory import PeakMemory
from dist_vlm.workers.sampler import sampling_bytes
from dist_vlm.workers.vision import FeatureStore, ImageStore

from .test_runner import rank_config


@pytest.fixture(scope="module")
def spec(facts_7b):
    return read_spec(str(facts_7b))


def test_a_configured_size_is_taken_as_it_is(facts_7b):
    assert kv_cache_bytes(rank_config(facts_7b, kv_cache_bytes=12345), 0) == 12345


def test_a_cpu_rank_needs_a_size(facts_7b):
    with pytest.raises(ValueError, match="kv_cache_bytes = None"):
        kv_cache_bytes(rank_config(facts_7b, kv_cache_bytes=None), 0)


def test_the_arena_of_a_7b_step_by_hand(spec, facts_7b):
    config = rank_config(facts_7b, max_num_batched_tokens=8192, max_num_seqs=256)
    # 8192 tokens x (4 x 4096 hidden + 3 x 11008 MLP, wider than the heads' 2 x 3 x 4096) x 2 bytes.
    # The logits are float32, twice while they are gathered; sampling says itself what it takes.
    logits = 2 * 256 * 32064 * 4 + sampling_bytes(256, 32064, config.max_model_len)
    expected = 8192 * (4 * 4096 + 3 * 11008) * 2 + logits
    assert activation_bytes(spec, config, torch.bfloat16) == expected
    halved = activation_bytes(spec, dataclasses.replace(config, world_size=2), torch.bfloat16)
    assert halved == 8192 * (4 * 4096 + 3 * 11008 // 2) * 2 + logits


# Of the 7b model: 3 x 336 x 336 pixels, 576 selected rows, and 577 rows of the MLP.
IMAGE_NUMBERS = 3 * 336**2 + 576 * 1024 + 577 * (1024 + 3 * 4096)
ARENA = 512 << 20


@pytest.mark.parametrize(
    ("changes", "dtype", "images"),
    [
        ({"max_num_batched_tokens": 32768}, torch.bfloat16, ARENA // (2 * IMAGE_NUMBERS)),
        ({"max_num_batched_tokens": 32768}, torch.float32, ARENA // (4 * IMAGE_NUMBERS)),
        # No more than a step encodes: 8192 rows are 14 images, two ranks have 7 each.
        ({"max_num_batched_tokens": 8192, "world_size": 2}, torch.bfloat16, 7),
        ({"max_num_batched_tokens": 8192, "world_size": 4}, torch.bfloat16, 4),
        ({"max_num_batched_tokens": 8192, "world_size": 2, "vision_data_parallel": False}, torch.bfloat16, 14),
        ({"max_num_batched_tokens": 576 * 3 - 1}, torch.bfloat16, 2),
        ({"max_num_batched_tokens": 64}, torch.bfloat16, 1),
    ],
    ids=str,
)
def test_as_many_images_are_encoded_at_once_as_fit_the_arena(spec, facts_7b, changes, dtype, images):
    config = rank_config(facts_7b, **changes)
    assert encoder_batch_images(spec, config, dtype) == images
    assert vision_arena_bytes(spec, config, dtype) == images * IMAGE_NUMBERS * dtype.itemsize <= ARENA


def test_an_image_larger_than_the_arena_is_encoded_alone(spec, facts_7b):
    huge = dataclasses.replace(spec, image_activation_size=ARENA)
    config = rank_config(facts_7b, max_num_batched_tokens=8192)
    assert encoder_batch_images(huge, config, torch.bfloat16) == 1
    assert vision_arena_bytes(huge, config, torch.bfloat16) == 2 * ARENA


def test_a_ranks_images_by_hand(spec, facts_7b):
    config = rank_config(facts_7b, max_num_batched_tokens=8192, feature_cache_tokens=32768)
    row, image = 4096 * 2, 2 * IMAGE_NUMBERS
    assert image_bytes(spec, config, torch.bfloat16) == 32768 * row + 14 * image
    # Two ranks: 7 images each, encoded and padded; twice 14 gathered.
    split = dataclasses.replace(config, world_size=2)
    assert image_bytes(spec, split, torch.bfloat16) == (32768 + (7 + 7 + 2 * 14) * 576) * row + 7 * image
    whole = dataclasses.replace(split, vision_data_parallel=False)
    assert image_bytes(spec, whole, torch.bfloat16) == image_bytes(spec, config, torch.bfloat16)


def test_a_model_without_images_has_no_arena(spec, facts_7b):
    text = dataclasses.replace(spec, image_feature_size=None, image_activation_size=None)
    config = rank_config(facts_7b)
    assert image_bytes(text, config, torch.bfloat16) == vision_arena_bytes(text, config, torch.bfloat16) == 0
    assert encoder_batch_images(text, config, torch.bfloat16) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_gpu_encodes_a_full_batch_within_the_arena(spec, facts_7b, dtype):
    device = torch.device("cuda")
    config = rank_config(facts_7b, max_num_batched_tokens=8192, device="cuda")
    vision = get_family(spec.family).build_vision(spec, ops=choose("torch", device), dtype=dtype, device=device)
    features = FeatureStore(
        vision=vision,
        comm=single_rank(),
        dtype=dtype,
        device=device,
        hidden_size=spec.hidden_size,
        batch_images=encoder_batch_images(spec, config, dtype),
        data_parallel=True,
    )
    for parameter in vision.module.parameters():
        parameter.data.normal_(std=0.02)
    images, keys = ImageStore(), [f"i{n}" for n in range(14)]
    for key in keys:
        images.stage(key, "pixel_values", np.zeros(spec.image_input_shape, np.float32))
    with torch.inference_mode():
        rows = dict.fromkeys(keys, 576)
        features.encode_later(keys[:1], images, rows)  # the libraries' own workspaces
        features.drop(keys)
        peak = PeakMemory(device)
        assert features.encode_later(keys, images, rows).to_host().failures() == ()
    held = sum(rows.nbytes for rows in features.features.values())
    assert held == 14 * 576 * 4096 * dtype.itemsize
    bound = vision_arena_bytes(spec, config, dtype)
    used = peak.growth_bytes()
    print(f"{dtype}: {used / 2**20:.1f} MiB, {held / 2**20:.1f} of features, arena {bound / 2**20:.1f}")
    assert used <= held + bound
    assert used > 0.5 * bound


@pytest.mark.gpu
def test_a_gpu_rank_gets_what_its_share_leaves(spec, facts_7b):
    config = rank_config(facts_7b, device="cuda", kv_cache_bytes=None, gpu_memory_utilization=0.5)
    total = torch.cuda.get_device_properties(0).total_memory
    alone = kv_cache_bytes(config, arena_bytes(spec, config, torch.bfloat16, 0))
    assert 0.4 * total < alone < 0.5 * total
    shared = dataclasses.replace(config, world_size=2, share_gpu=True)
    assert kv_cache_bytes(shared, arena_bytes(spec, shared, torch.bfloat16, 0)) < alone / 2 + (1 << 30)


def test_a_ranks_arena_by_hand(spec, facts_7b):
    config = rank_config(facts_7b, max_num_batched_tokens=8192, max_num_seqs=256, feature_cache_tokens=32768)
    parts = activation_bytes(spec, config, torch.bfloat16) + image_bytes(spec, config, torch.bfloat16)
    assert arena_bytes(spec, config, torch.bfloat16, 1000) == parts + 1000
    recorded = arena_bytes(spec, config, torch.bfloat16, 1000, is_recorded=True)
    assert recorded == parts + 1000 + recorded_bytes(spec, config, torch.bfloat16) > parts + 1000
