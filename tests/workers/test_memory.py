import dataclasses

import pytest
import torch

from dist_vlm.workers.memory import activation_bytes, image_bytes, kv_cache_bytes
from dist_vlm.workers.models import read_spec

from .test_runner import rank_config


@pytest.fixture(scope="module")
def spec(facts_7b):
    return read_spec(str(facts_7b))


def test_a_configured_size_is_taken_as_it_is(spec, facts_7b):
    assert kv_cache_bytes(spec, rank_config(facts_7b, kv_cache_bytes=12345), torch.bfloat16, 0) == 12345


def test_a_cpu_rank_needs_a_size(spec, facts_7b):
    with pytest.raises(ValueError, match="kv_cache_bytes = None"):
        kv_cache_bytes(spec, rank_config(facts_7b, kv_cache_bytes=None), torch.bfloat16, 0)


def test_the_arena_of_a_7b_step_by_hand(spec, facts_7b):
    config = rank_config(facts_7b, max_num_batched_tokens=8192, max_num_seqs=256)
    # 8192 tokens x (4 x 4096 hidden + 3 x 11008 MLP, wider than the heads' 2 x 3 x 4096) x 2 bytes, and the logits.
    expected = 8192 * (4 * 4096 + 3 * 11008) * 2 + 4 * 256 * 32064 * 4
    assert activation_bytes(spec, config, torch.bfloat16) == expected
    halved = activation_bytes(spec, dataclasses.replace(config, world_size=2), torch.bfloat16)
    assert halved == 8192 * (4 * 4096 + 3 * 11008 // 2) * 2 + 4 * 256 * 32064 * 4
    assert image_bytes(spec, config, torch.bfloat16) > 2 * 8192 * 4096 * 2
    assert image_bytes(dataclasses.replace(spec, image_feature_size=None), config, torch.bfloat16) == 0


@pytest.mark.gpu
def test_a_gpu_rank_gets_what_its_share_leaves(spec, facts_7b):
    config = rank_config(facts_7b, device="cuda", kv_cache_bytes=None, gpu_memory_utilization=0.5)
    total = torch.cuda.get_device_properties(0).total_memory
    alone = kv_cache_bytes(spec, config, torch.bfloat16, 0)
    assert 0.4 * total < alone < 0.5 * total
    shared = dataclasses.replace(config, world_size=2, share_gpu=True)
    assert kv_cache_bytes(spec, shared, torch.bfloat16, 0) < alone / 2 + (1 << 30)
