"""The engine core that a configuration describes."""

from __future__ import annotations

from dist_vlm.config import EngineConfig
from dist_vlm.engine.core import EngineCore
from dist_vlm.engine.feature_budget import feature_budget
from dist_vlm.engine.rank_config import executor_for
from dist_vlm.executor.base import Executor
from dist_vlm.workers.models import read_spec


def make_core(config: EngineConfig, executor: Executor | None = None) -> EngineCore:
    """Nothing starts before the core's `start`.

    config: resolved. executor: takes the place of the one the configuration names.
    """
    assert config.model.max_model_len is not None, "resolve() decides it"
    assert config.scheduler.max_num_batched_tokens is not None, "resolve() decides it"
    budget = feature_budget(config, read_spec(config.model.model))
    return EngineCore(
        executor or executor_for(config),
        block_size=config.cache.block_size,
        max_model_len=config.model.max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        depth=config.scheduler.max_steps_in_flight,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        feature_rows=budget.capacity_rows,
        keep_features=budget.keeps_unneeded,
        max_restarts=config.parallel.max_restarts or 0,
    )
