"""A front over a checkpoint's JSON files: tokenizer, processor, no weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_vlm.config import EngineConfig, resolve
from dist_vlm.engine.front import Front, load_front


@pytest.fixture(scope="session")
def front(tiny_facts: Path) -> Front:
    """Images of 16 tokens, 56x56 pixels, features 64 wide; at most 128 tokens a sequence."""
    return load_front(resolve(EngineConfig.from_fields(model=str(tiny_facts), max_model_len=128, device="cpu")))
