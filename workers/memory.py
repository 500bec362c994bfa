"""How many KV blocks fit a rank: computed from shapes, never profiled."""

from __future__ import annotations

import dataclasses

import torch

from dist_vlm.kernels.all_reduce.peer_buffers import PEER_CAPACITY, memory_bytes
from dist_vlm.workers.config import RankConfig
from dist_vlm.workers.models.spec import ModelSpec
from dist_vlm.workers.recorded_vision import MAX_IMAGES
from dist_vlm.workers.sampler import sampling_bytes
from dist_vlm.workers.short_steps import MAX_TOKENS

# Thirty-one images of a 336-pixel tower in bfloat16. An H100 takes 10 ms for one image alone, 1.1 ms for each
# of ten, 1.0 ms for each of twenty.
VISION_ARENA_BYTES = 512 << 20


def activation_bytes(spec: ModelSpec, config: RankConfig, dtype: torch.dtype) -> int:
    """Upper bound of what one step allocates beside weights, cache and the attention workspace.

    T tokens hold at once the residual, a normed copy, a partial sum and its reduction (4 x hidden_size), the
    queries, keys and values before and after rotation, or the gate, up and product of the MLP; the logits of
    every slot are float32, gathered through one copy, and sampled. Where steps are computed in halves, what their sums
    allocate has memory of its own.
    """
    tokens, ranks = config.max_num_batched_tokens, config.world_size
    heads = 2 * (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim // ranks
    widest = max(heads, 3 * spec.intermediate_size // ranks)
    rows_of_hidden = 6 if config.halve_step_tokens is not None else 4
    hidden = tokens * (rows_of_hidden * spec.hidden_size + widest) * dtype.itemsize
    logits = 2 * 4 * config.max_num_seqs * spec.vocab_size
    return hidden + logits + sampling_bytes(config.max_num_seqs, spec.vocab_size, config.max_model_len)


def encoder_batch_images(spec: ModelSpec, config: RankConfig, dtype: torch.dtype) -> int:
    """Images that go through the encoder at once: as many as fit the vision arena, at least one, and not more than a
    rank encodes in a step.

    The arena of `VISION_ARENA_BYTES` is cut into images' activations (`ModelSpec.image_activation_size`), which grow
    with the batch by the same amount for each image. A step encodes at most `max_num_batched_tokens` feature rows, or
    one image of more; ranks that split them have an equal share each.
    """
    if spec.image_activation_size is None:
        return 1
    fitting = VISION_ARENA_BYTES // (spec.image_activation_size * dtype.itemsize)
    return max(1, min(fitting, _share(spec, config)))


def vision_arena_bytes(spec: ModelSpec, config: RankConfig, dtype: torch.dtype) -> int:
    """Upper bound of what the encoder allocates while it runs, and of its batch's features before they are copied."""
    if spec.image_activation_size is None:
        return 0
    return encoder_batch_images(spec, config, dtype) * spec.image_activation_size * dtype.itemsize


def image_bytes(spec: ModelSpec, config: RankConfig, dtype: torch.dtype) -> int:
    """Upper bound of a rank's images: the features it holds, a step's on their way to it, and the vision arena.

    The features of a step are held already; where ranks split its images, each has beside them its share, encoded and
    then padded, and what it gathers, in parts and then stacked.
    """
    if spec.image_feature_size is None:
        return 0
    rows = config.feature_cache_tokens
    if _splits(config):
        rows += 2 * (1 + config.world_size) * _share(spec, config) * spec.image_feature_size
    return rows * spec.hidden_size * dtype.itemsize + vision_arena_bytes(spec, config, dtype)


def _splits(config: RankConfig) -> bool:
    return config.vision_data_parallel and config.world_size > 1


def _share(spec: ModelSpec, config: RankConfig) -> int:
    """Images that one rank encodes in a step, at most."""
    assert spec.image_feature_size is not None
    images = max(1, config.max_num_batched_tokens // spec.image_feature_size)
    return -(-images // config.world_size) if _splits(config) else images


def recorded_bytes(spec: ModelSpec, config: RankConfig, dtype: torch.dtype) -> int:
    """Upper bound of what recorded steps and encodings hold for good: recordings of one kind share their memory."""
    tokens = max(config.max_num_seqs, MAX_TOKENS)
    # Edits of logits and draws are not recorded.
    drawn = sampling_bytes(config.max_num_seqs, spec.vocab_size, config.max_model_len)
    step = activation_bytes(spec, dataclasses.replace(config, max_num_batched_tokens=tokens), dtype) - drawn
    images = 0 if spec.image_activation_size is None else MAX_IMAGES * spec.image_activation_size * dtype.itemsize
    return step + images


def arena_bytes(
    spec: ModelSpec, config: RankConfig, dtype: torch.dtype, workspace_bytes: int, *, is_recorded: bool = False
) -> int:
    """Upper bound of what a rank allocates beside weights, KV cache and the collectives' buffers.

    is_recorded: whether steps and encodings are recorded, see `recorded_bytes`.
    """
    arena = activation_bytes(spec, config, dtype) + image_bytes(spec, config, dtype) + workspace_bytes
    return arena + (recorded_bytes(spec, config, dtype) if is_recorded else 0)


def kv_cache_bytes(config: RankConfig, arena: int) -> int:
    """Bytes of this rank's KV cache: as configured, or on a GPU what its share of the memory leaves.

    arena: see `arena_bytes`.
    """
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes
    if config.device != "cuda":
        raise ValueError("kv_cache_bytes = None: a CPU rank needs a number of bytes")
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    held = torch.cuda.memory_allocated()
    if config.world_size > 1 and config.collectives != "group":
        arena += memory_bytes(PEER_CAPACITY)
    ranks_on_gpu = config.world_size if config.share_gpu else 1
    return int(total * config.gpu_memory_utilization) // ranks_on_gpu - held - arena
