"""Decides every `auto` of a configuration from the checkpoint's JSON files and this machine; refuses the impossible.

Imports no torch: a configuration can be shown and checked in a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dist_vlm.config import (
    RULES,
    CacheConfig,
    ConfigError,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VisionConfig,
)
from dist_vlm.kernels.compiler import find_compiler
from dist_vlm.kernels.triton_support import triton_found, triton_interpreted
from dist_vlm.machine import nvidia_gpu_seen, usable_cores
from dist_vlm.workers.models import CheckpointError, read_spec

if TYPE_CHECKING:
    from dist_vlm.workers.models import ModelSpec

_log = logging.getLogger(__name__)

_CPU_KV_CACHE_GIB = 1.0
_RESTARTS_AN_HOUR = 2
# Steps of so many tokens a GPU keep the streams' pauses short, and are as fast as longer ones
# (benchmarks/results/2026-11-30-h200*-throughput-budget-*.json).
_STEP_TOKENS_A_GPU = 2048


def resolved(config: EngineConfig) -> EngineConfig:
    """See `dist_vlm.config.resolve`."""
    spec = _read_spec(config.model.model)
    _check_shards(config.parallel, spec)
    parallel = _with_restarts(config)
    model = _resolved_model(config.model, spec)
    return dataclasses.replace(
        config,
        model=model,
        vision=_resolved_vision(config.vision, spec, model.model),
        cache=_resolved_cache(config.cache, parallel.device, model),
        scheduler=_resolved_scheduler(config.scheduler, parallel),
        parallel=parallel,
    )


def resolved_without_checkpoint(config: EngineConfig) -> EngineConfig:
    """Decides what needs no checkpoint; the rest stays `auto` or none."""
    parallel = _with_restarts(config)
    cache = _resolved_cache(config.cache, parallel.device, config.model)
    scheduler = _resolved_scheduler(config.scheduler, parallel)
    return dataclasses.replace(config, cache=cache, scheduler=scheduler, parallel=parallel)


def _with_restarts(config: EngineConfig) -> ParallelConfig:
    parallel = resolved_parallel(config.parallel)
    if parallel.max_restarts is not None:
        return parallel
    return dataclasses.replace(parallel, max_restarts=0 if config.most_replicas > 1 else _RESTARTS_AN_HOUR)


def resolved_parallel(parallel: ParallelConfig) -> ParallelConfig:
    device = parallel.device
    if device == "auto":
        device = "cuda" if nvidia_gpu_seen() else "cpu"
    if device == "cuda" and parallel.executor == "inline" and not nvidia_gpu_seen():
        raise ConfigError("must be auto or cpu: no NVIDIA GPU is seen here", field="parallel.device", value=device)
    threads = parallel.threads_per_rank
    if device == "cpu" and threads is None:
        replicas_per_node = -(-parallel.replicas // parallel.num_nodes)
        threads = max(1, usable_cores() // (parallel.tensor_parallel_size * replicas_per_node))
    kernels = _auto_kernels(device) if parallel.kernels == "auto" else parallel.kernels
    _check_kernels(kernels, device)
    return dataclasses.replace(parallel, device=device, threads_per_rank=threads, kernels=kernels)


def _auto_kernels(device: str) -> str:
    if device != "cpu":
        if triton_found():
            return "triton"
        _log.warning("triton cannot be imported: the ops run in torch, slower (install triton, or set kernels: torch)")
        return "torch"
    if find_compiler() is not None:
        return "cpp"
    _log.warning("no C++ compiler is found: the ops run in torch, slower (install g++, or set kernels: torch)")
    return "torch"


def _check_kernels(kernels: str, device: str) -> None:
    problem = None
    if kernels == "cpp" and device != "cpu":
        problem = "must be auto, reference, torch or triton on a GPU"
    elif kernels == "triton" and not triton_found():
        problem = "must be auto, reference, torch or cpp: triton cannot be imported here"
    elif kernels == "triton" and device == "cpu" and not triton_interpreted():
        problem = "must be auto, reference, torch or cpp on a CPU, unless TRITON_INTERPRET=1 is set"
    if problem is not None:
        raise ConfigError(problem, field="parallel.kernels", value=kernels)


def _read_spec(path: str) -> ModelSpec:
    try:
        return read_spec(path)
    except (CheckpointError, OSError) as error:
        raise ConfigError(str(error), field="model.model", value=path) from None


def _resolved_model(model: ModelConfig, spec: ModelSpec) -> ModelConfig:
    limit, length = spec.max_position_embeddings, model.max_model_len
    if length is not None and length > limit:
        problem = f"must be an integer from 1 to {limit}, the checkpoint's limit, or none for that limit"
        raise ConfigError(problem, field="model.max_model_len", value=length)
    path = os.path.abspath(model.model)
    return dataclasses.replace(
        model,
        model=path,
        tokenizer=_existing_directory("model.tokenizer", model.tokenizer or path),
        dtype=spec.dtype if model.dtype == "auto" else model.dtype,
        load_format="safetensors" if model.load_format == "auto" else model.load_format,
        max_model_len=limit if length is None else length,
    )


def _resolved_vision(vision: VisionConfig, spec: ModelSpec, model_path: str) -> VisionConfig:
    facts = {
        "image_token_id": spec.image_token_id,
        "image_input_shape": spec.image_input_shape,
        "image_feature_size": spec.image_feature_size,
    }
    for name, fact in facts.items():
        given = getattr(vision, name)
        if given is not None and given != fact:
            allowed = "none: the checkpoint takes no pictures" if fact is None else f"{fact}, the checkpoint's, or none"
            raise ConfigError(f"must be {allowed}", field=f"vision.{name}", value=given)
    processor = None
    if not vision.disable_image_processor and spec.image_token_id is not None:
        processor = _existing_directory("vision.image_processor", vision.image_processor or model_path)
    changes: dict[str, Any] = {**facts, "image_processor": processor}
    return dataclasses.replace(vision, **changes)


def _resolved_cache(cache: CacheConfig, device: str, model: ModelConfig) -> CacheConfig:
    blocks, length = cache.num_gpu_blocks_override, model.max_model_len
    if blocks is not None and length is not None and blocks * cache.block_size < length:
        needed = -(-length // cache.block_size)
        problem = f"must be at least {needed}: a sequence of max_model_len {length} needs as many blocks"
        raise ConfigError(problem, field="cache.num_gpu_blocks_override", value=blocks)
    if device == "cpu" and cache.kv_cache_memory_gib is None:
        return dataclasses.replace(cache, kv_cache_memory_gib=_CPU_KV_CACHE_GIB)
    return cache


def _resolved_scheduler(scheduler: SchedulerConfig, parallel: ParallelConfig) -> SchedulerConfig:
    if scheduler.max_num_batched_tokens is not None:
        return scheduler
    # CPU ranks, and ranks on one GPU, share what computes.
    num_devices = parallel.tensor_parallel_size if parallel.device == "cuda" and not parallel.share_gpu else 1
    tokens = max(_STEP_TOKENS_A_GPU * num_devices, scheduler.max_num_seqs)
    return dataclasses.replace(scheduler, max_num_batched_tokens=tokens)


def _check_shards(parallel: ParallelConfig, spec: ModelSpec) -> None:
    size = parallel.tensor_parallel_size
    problems = list(_shard_problems(size, spec))
    if problems:
        high = int(RULES["tensor_parallel_size"].high or size)
        fitting = [str(n) for n in range(1, high + 1) if not list(_shard_problems(n, spec))]
        problem = f"{problems[0]}; must be one of {', '.join(fitting)}"
        raise ConfigError(problem, field="parallel.tensor_parallel_size", value=size)


def _shard_problems(size: int, spec: ModelSpec) -> Iterable[str]:
    if spec.num_heads % size:
        yield f"the checkpoint's {spec.num_heads} attention heads do not divide into {size} equal parts"
    if spec.num_kv_heads % size and size % spec.num_kv_heads:
        yield f"the checkpoint's {spec.num_kv_heads} KV heads neither divide into {size} parts nor repeat over them"
    if spec.intermediate_size % size:
        yield f"the checkpoint's intermediate_size {spec.intermediate_size} does not divide into {size} equal parts"


def _existing_directory(field: str, path: str) -> str:
    if not os.path.isdir(path):
        raise ConfigError("must be an existing directory", field=field, value=path)
    return os.path.abspath(path)
