"""How many KV blocks fit a rank: computed from shapes, never profiled."""

from __future__ import annotations

import torch

from dist_vlm.workers.config import RankConfig
from dist_vlm.workers.models.spec import ModelSpec


def activation_bytes(spec: ModelSpec, config: RankConfig, dtype: torch.dtype) -> int:
    """Upper bound of what one step allocates beside weights, cache and the attention workspace.

    T tokens hold at once the residual, a normed copy, a partial sum and its reduction (4 x hidden_size), the
    queries, keys and values before and after rotation, or the gate, up and product of the MLP; the logits of
    every slot are float32, gathered, and sampled through three copies.
    """
    tokens, ranks = config.max_num_batched_tokens, config.world_size
    heads = 2 * (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim // ranks
    widest = max(heads, 3 * spec.intermediate_size // ranks)
    hidden = tokens * (4 * spec.hidden_size + widest) * dtype.itemsize
    logits = 4 * config.max_num_seqs * spec.vocab_size * 4
    return hidden + logits


def image_bytes(spec: ModelSpec, config: RankConfig, dtype: torch.dtype) -> int:
    """Upper bound of the features a rank holds: those of images that a step's tokens lie in, twice over for one
    step's encoding beside the last step's remainder, and one image's encoder activations."""
    if spec.image_feature_size is None or spec.image_feature_width is None:
        return 0
    rows = 2 * (config.max_num_batched_tokens + spec.image_feature_size)
    encoder = 16 * (spec.image_feature_size + 1) * spec.image_feature_width
    return (rows * spec.hidden_size + encoder) * dtype.itemsize


def kv_cache_bytes(spec: ModelSpec, config: RankConfig, dtype: torch.dtype, workspace_bytes: int) -> int:
    """Bytes of this rank's KV cache: as configured, or on a GPU what its share of the memory leaves."""
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes
    if config.device != "cuda":
        raise ValueError("kv_cache_bytes = None: a CPU rank needs a number of bytes")
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    held = torch.cuda.memory_allocated()
    arena = activation_bytes(spec, config, dtype) + image_bytes(spec, config, dtype) + workspace_bytes
    ranks_on_gpu = config.world_size if config.share_gpu else 1
    return int(total * config.gpu_memory_utilization) // ranks_on_gpu - held - arena
