"""One server over scripted ranks for all tests that only ask it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_vlm.async_llm import AsyncLLM
from dist_vlm.config import EngineConfig, resolve
from dist_vlm.config_environment import resolved_server
from dist_vlm.config_server import ServerConfig

from .live import Live, serving


@pytest.fixture(scope="session")
def server_engine(tiny_facts: Path) -> EngineConfig:
    """Scripted ranks; images of 16 tokens; at most 512 tokens a sequence."""
    return resolve(
        EngineConfig.from_fields(
            model=str(tiny_facts), device="cpu", executor="fake", max_model_len=512, max_num_seqs=8, block_size=8,
            max_num_batched_tokens=512, num_gpu_blocks_override=1024,
        )
    )  # fmt: skip


@pytest.fixture(scope="session")
def server_config(server_engine: EngineConfig) -> ServerConfig:
    config = ServerConfig(
        served_model_name="tiny", allowed_media_networks=("127.0.0.0/8",), image_fetch_timeout_s=0.5, max_body_mib=4,
        max_image_mib=2, media_workers=1, uvicorn_log_level="warning",
    )  # fmt: skip
    return resolved_server(config, server_engine, {})


@pytest.fixture(scope="session")
def live(server_engine: EngineConfig, server_config: ServerConfig) -> Iterator[Live]:
    llm = AsyncLLM.from_config(server_engine)
    try:
        with serving(llm, server_config) as live:
            yield live
    finally:
        llm.shutdown()
