"""What a rank is told at its start, and what it reports back while it starts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankConfig:
    """Everything a rank must know to build its shard. Every field is decided: there is no `auto` here.

    model: path of the checkpoint directory.
    dtype: "float32", "bfloat16" or "float16".
    device: "cpu" or "cuda"; the ordinal is the placement's.
    load_format: "safetensors" or "dummy" (random weights of the right shapes).
    rank, world_size: this rank's place in its tensor-parallel group.
    block_size: token positions in one KV block.
    max_model_len: longest sequence, in tokens.
    max_num_seqs: number of slots.
    max_num_batched_tokens: most tokens in one step.
    gpu_memory_utilization: share of a GPU's memory that all allocations together may take.
    kv_cache_bytes: size of this rank's KV cache; None lets a GPU rank compute it from its memory.
    num_threads: threads that torch may use on a CPU; 0 leaves torch's own choice.
    kernels: "reference", "torch", "cpp" or "triton".
    share_gpu: whether several ranks share one GPU; their process group is then one of gloo.
    collectives: "fused" takes the fused ones where they can be used and pass their certificate, "strict" refuses to
        start without them, "group" takes those of the process group.
    collectives_table: JSON that says which of them is used for which size; None takes what comes with the package.
    halve_step_tokens: steps of at least so many tokens are computed in two halves, see `dist_vlm.workers.halves`; None
        for no step.
    seed: seeds the weights of `load_format` "dummy".
    feature_cache_tokens: most feature rows of encoded images this rank holds at once.
    vision_data_parallel: whether a step's images are split over the ranks and their features gathered.
    """

    model: str
    dtype: str
    device: str
    load_format: str
    rank: int
    world_size: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    kv_cache_bytes: int | None
    num_threads: int
    kernels: str
    share_gpu: bool
    collectives: str
    collectives_table: str | None
    halve_step_tokens: int | None
    seed: int
    feature_cache_tokens: int
    vision_data_parallel: bool


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What one rank holds after loading its weights.

    num_language_parameters: parameters of this rank's shard, padding of the vocabulary included.
    num_vision_parameters: parameters of the replicated vision encoder and projector.
    weight_bytes: bytes of both.
    peak_load_bytes: highest resident (CPU) or allocated (GPU) memory while loading, less that before it.
    kv_block_bytes: bytes of one KV block on this rank, all layers, keys and values.
    num_blocks: KV blocks that fit this rank's memory.
    kernels: the implementation chosen for each op, by name.
    load_us: microseconds spent loading.
    """

    rank: int
    num_language_parameters: int
    num_vision_parameters: int
    weight_bytes: int
    peak_load_bytes: int
    kv_block_bytes: int
    num_blocks: int
    kernels: dict[str, str]
    load_us: int
