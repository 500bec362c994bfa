"""Puts a server's parts together and takes them apart again."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager

from dist_vlm.async_llm import AsyncLLM
from dist_vlm.config_server import ServerConfig
from dist_vlm.engine.picture_pool import PicturePool
from dist_vlm.machine import usable_cores
from dist_vlm.media.fetch import PictureFetcher
from dist_vlm.server.admission import Admission
from dist_vlm.server.body import BodyReader
from dist_vlm.server.byte_budget import ByteBudget
from dist_vlm.server.health import HealthMonitor
from dist_vlm.server.held_metrics import HeldMetrics
from dist_vlm.server.metrics import Metrics
from dist_vlm.server.pictures import PictureIntake
from dist_vlm.server.services import Services

_MIB = 1 << 20
# Threads that render templates and tokenize, where half of the cores are as many.
_MAX_RENDERERS = 2
# How long a request waits for memory before it is told to come back.
_MEMORY_WAIT_S = 30.0


@asynccontextmanager
async def services_of(llm: AsyncLLM, config: ServerConfig) -> AsyncIterator[Services]:
    """What the endpoints share, over an engine that has started; ends all of it but the engine.

    config: resolved (`config_environment.resolved_server`).
    """
    assert config.served_model_name is not None, "resolved_server() decides it"
    metrics = Metrics(config.served_model_name)
    num_slots = llm.config.scheduler.max_num_seqs * llm.config.most_replicas
    admission = Admission(max_seats=num_slots + config.max_queued_requests, num_running=num_slots)
    max_body_bytes, max_file_bytes = math.ceil(config.max_body_mib * _MIB), math.ceil(config.max_image_mib * _MIB)
    # Whoever holds of one asks no other before it in this order, so that one can always go on.
    bodies, arrays, files = (
        ByteBudget(name, max(least, config.media_memory_mib * _MIB // part), timeout_s=_MEMORY_WAIT_S)
        for name, part, least in (("bodies", 4, max_body_bytes), ("arrays", 2, 0), ("files", 4, max_file_bytes))
    )
    HeldMetrics(metrics, admission=admission, budgets=(bodies, arrays, files))
    async with AsyncExitStack() as ending:
        renderers = ending.enter_context(_renderers())
        fetcher = await _fetcher(config, max_bytes=max_file_bytes, ending=ending)
        pool = await _pool(llm, config, max_bytes=max_file_bytes, ending=ending)
        health = HealthMonitor(llm, limit_s=config.health_timeout_s, metrics=metrics)
        watching = asyncio.create_task(health.run())
        ending.push_async_callback(_stopped, watching)
        yield Services(
            llm=llm,
            config=config,
            model=config.served_model_name,
            created=int(time.time()),
            admission=admission,
            body_reader=BodyReader(max_bytes=max_body_bytes, timeout_s=config.body_timeout_s),
            bodies=bodies,
            arrays=arrays,
            pictures=PictureIntake(
                fetcher=fetcher, pool=pool, files=files, max_file_bytes=max_file_bytes, metrics=metrics
            ),
            health=health,
            metrics=metrics,
            renderers=renderers,
        )


def _renderers() -> ThreadPoolExecutor:
    """On few cores the event loop would wait for a lock that a thread holds which waits for a core."""
    return ThreadPoolExecutor(max(1, min(_MAX_RENDERERS, usable_cores() // 2)), thread_name_prefix="render")


async def _fetcher(config: ServerConfig, *, max_bytes: int, ending: AsyncExitStack) -> PictureFetcher | None:
    if config.disable_media_fetch:
        return None
    assert config.image_fetch_timeout_s is not None, "resolved_server() decides it"
    fetcher = PictureFetcher(
        timeout_s=config.image_fetch_timeout_s,
        max_bytes=max_bytes,
        allowed_hosts=config.allowed_media_hosts,
        allowed_networks=config.allowed_media_networks,
    )
    ending.push_async_callback(fetcher.close)
    return fetcher


async def _pool(llm: AsyncLLM, config: ServerConfig, *, max_bytes: int, ending: AsyncExitStack) -> PicturePool | None:
    if llm.front.spec.image_token_id is None or llm.config.vision.disable_image_processor:
        return None
    assert config.media_workers is not None, "resolved_server() decides it"
    pool = PicturePool(
        llm.config,
        num_workers=config.media_workers,
        memory_bytes=config.media_worker_memory_mib * _MIB,
        max_bytes=max_bytes,
    )
    ending.callback(pool.close)
    await asyncio.to_thread(pool.start)
    return pool


async def _stopped(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
