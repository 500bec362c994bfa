from __future__ import annotations

import dataclasses

import pytest
import torch

from dist_vlm.workers.config import RankConfig
from dist_vlm.workers.dummy_source import DummySource
from dist_vlm.workers.models import CheckpointError, read_spec
from dist_vlm.workers.safetensors_source import SafetensorsSource
from dist_vlm.workers.weights import open_weights

CONFIG = RankConfig(
    model="",
    dtype="float32",
    device="cpu",
    load_format="safetensors",
    rank=0,
    world_size=1,
    block_size=16,
    max_model_len=64,
    max_num_seqs=2,
    max_num_batched_tokens=64,
    gpu_memory_utilization=0.9,
    kv_cache_bytes=1 << 20,
    num_threads=1,
    kernels="torch",
    share_gpu=False,
    collectives="group",
    collectives_table=None,
    halve_step_tokens=None,
    seed=3,
    feature_cache_tokens=256,
    vision_data_parallel=True,
)


def test_the_load_format_names_the_source(tiny_checkpoint) -> None:
    spec = read_spec(str(tiny_checkpoint))
    with open_weights(CONFIG, spec) as source:
        assert isinstance(source, SafetensorsSource)
    dummy = open_weights(dataclasses.replace(CONFIG, load_format="dummy"), spec)
    assert isinstance(dummy, DummySource)
    assert dummy.seed == 3


def test_an_unknown_load_format_is_refused(tiny_facts) -> None:
    with pytest.raises(ValueError, match="load_format is 'pickle', must be one of safetensors, dummy"):
        open_weights(dataclasses.replace(CONFIG, load_format="pickle"), read_spec(str(tiny_facts)))


def test_a_checkpoint_without_weights_is_refused(tiny_facts) -> None:
    with pytest.raises(CheckpointError, match="has no weights: neither model.safetensors nor"):
        open_weights(CONFIG, read_spec(str(tiny_facts)))


def test_only_a_matrix_has_a_second_axis_to_cut() -> None:
    with pytest.raises(ValueError, match=r"second axis of shape \[4, 2, 2\]"):
        DummySource(0).copy_into(torch.zeros(4, 2), "w", shape=(4, 2, 2), index=(slice(None), slice(0, 1)))


def test_names_neither_read_nor_skipped_are_told(tiny_checkpoint) -> None:
    with SafetensorsSource(tiny_checkpoint) as source:
        prefix = "multi_modal_projector."
        assert source.unasked(prefix + "linear_1") == [prefix + "linear_1.bias", prefix + "linear_1.weight"]
        source.skip(prefix + "linear_1.weight")
        source.copy_into(torch.empty(128), prefix + "linear_1.bias", shape=(128,))
        assert source.unasked(prefix) == [prefix + "linear_2.bias", prefix + "linear_2.weight"]
