"""A front over a checkpoint's JSON files: tokenizer, processor, no weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dist_vlm.config import EngineConfig, resolve
from dist_vlm.engine.core import EngineCore
from dist_vlm.engine.front import Front, load_front
from dist_vlm.engine.make_core import make_core as core_of
from dist_vlm.executor.base import Executor


@pytest.fixture(scope="session")
def front(tiny_facts: Path) -> Front:
    """Images of 16 tokens, 56x56 pixels, features 64 wide; at most 128 tokens a sequence."""
    return load_front(resolve(EngineConfig.from_fields(model=str(tiny_facts), max_model_len=128, device="cpu")))


@pytest.fixture(scope="session")
def engine_config(tiny_facts: Path) -> EngineConfig:
    """Scripted ranks of four slots and blocks of 8 tokens; 64 tokens a step, 128 a sequence."""
    return resolve(
        EngineConfig.from_fields(
            model=str(tiny_facts), device="cpu", executor="fake", max_model_len=128, max_num_seqs=4, block_size=8,
            max_num_batched_tokens=64, num_gpu_blocks_override=64,
        )
    )  # fmt: skip


@pytest.fixture(scope="session")
def make_core(engine_config: EngineConfig) -> Callable[[Executor], EngineCore]:
    return lambda executor: core_of(engine_config, executor)
