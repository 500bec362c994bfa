"""What the ranks are told, from a resolved configuration."""

from __future__ import annotations

import os
from pathlib import Path

from dist_vlm.config import ConfigError, EngineConfig
from dist_vlm.engine.feature_budget import ITEM_BYTES, feature_budget
from dist_vlm.executor import make_executor
from dist_vlm.executor.base import Executor
from dist_vlm.kernels.all_reduce.rules import RulesError, parse_table
from dist_vlm.workers.config import RankConfig
from dist_vlm.workers.models import ModelSpec, read_spec

_GIB = 1 << 30


def executor_for(config: EngineConfig) -> Executor:
    """The executor that a resolved configuration names; nothing starts yet."""
    parallel = config.parallel
    return make_executor(
        parallel.executor,
        rank_config(config, read_spec(config.model.model)),
        num_blocks=config.cache.num_gpu_blocks_override,
        ray_address=parallel.ray_address,
        start_timeout_s=parallel.start_timeout_s,
        step_timeout_s=parallel.step_timeout_s,
        transport=parallel.transport,
        max_steps_in_flight=config.scheduler.max_steps_in_flight,
    )


def rank_config(config: EngineConfig, spec: ModelSpec) -> RankConfig:
    """For rank 0; the executor gives each rank its own number."""
    parallel = config.parallel
    assert config.model.max_model_len is not None, "resolve() decides it"
    assert config.scheduler.max_num_batched_tokens is not None, "resolve() decides it"
    return RankConfig(
        model=config.model.model,
        dtype=config.model.dtype,
        device=parallel.device,
        load_format="dummy" if config.model.load_format == "dummy" else "safetensors",
        rank=0,
        world_size=parallel.tensor_parallel_size,
        block_size=config.cache.block_size,
        max_model_len=config.model.max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        gpu_memory_utilization=config.cache.gpu_memory_utilization,
        kv_cache_bytes=_kv_cache_bytes(config, spec),
        num_threads=_num_threads(config),
        kernels=parallel.kernels,
        share_gpu=parallel.share_gpu,
        collectives=parallel.collectives,
        collectives_table=_collectives_table(config),
        halve_step_tokens=parallel.halve_step_tokens,
        seed=config.model.seed,
        feature_cache_tokens=feature_budget(config, spec).capacity_rows,
        vision_data_parallel=config.vision.vision_data_parallel,
    )


def _kv_cache_bytes(config: EngineConfig, spec: ModelSpec) -> int | None:
    """One rank's KV cache: of so many blocks, of so many GiB, or None for what a GPU has left."""
    num_blocks, gib = config.cache.num_gpu_blocks_override, config.cache.kv_cache_memory_gib
    if num_blocks is not None:
        kv_heads = max(1, spec.num_kv_heads // config.parallel.tensor_parallel_size)
        row_bytes = kv_heads * spec.head_dim * ITEM_BYTES[config.model.dtype]
        return num_blocks * 2 * spec.num_layers * config.cache.block_size * row_bytes
    return None if gib is None else int(gib * _GIB)


def _collectives_table(config: EngineConfig) -> str | None:
    """The file's text, read and checked where the driver is. Raises `ConfigError`."""
    parallel = config.parallel
    path = parallel.collectives_table
    if path is None or parallel.tensor_parallel_size == 1:  # one rank adds nothing up
        return None
    field = "parallel.collectives_table"
    try:
        text = Path(path).read_text(encoding="utf-8")
        parse_table(text, config.parallel.tensor_parallel_size, path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"must be a file that can be read: {error}", field=field, value=path) from None
    except RulesError as error:
        raise ConfigError(f"must be a table for these ranks: {error}", field=field, value=path) from None
    return text


def _num_threads(config: EngineConfig) -> int:
    parallel = config.parallel
    if parallel.device != "cpu":
        return 0
    if parallel.threads_per_rank is not None:
        return parallel.threads_per_rank
    return max(1, len(os.sched_getaffinity(0)) // parallel.tensor_parallel_size)
