"""How a plan reaches the ranks. An executor is chosen by name; only what is chosen is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_vlm.executor.base import Executor
    from dist_vlm.workers.config import RankConfig

EXECUTORS = ("ray", "inline", "fake")


def make_executor(
    name: str,
    config: RankConfig,
    *,
    num_blocks: int | None = None,
    ray_address: str | None = None,
    start_timeout_s: float = 300.0,
    step_timeout_s: float = 60.0,
    transport: str = "ray",
    max_steps_in_flight: int = 2,
) -> Executor:
    """Builds an executor; nothing starts before its `start`.

    name: "ray", "inline" (one rank in this process) or "fake" (no rank: scripted answers).
    num_blocks: KV blocks a rank allocates; None takes what fits (the fake: its own default).
    ray_address, start_timeout_s, step_timeout_s, transport: for "ray" only.
    max_steps_in_flight: plans that may be submitted and not collected; the fake sets no limit.
    """
    if name == "ray":
        from dist_vlm.executor.ray import RayExecutor

        return RayExecutor(
            config,
            num_blocks=num_blocks,
            ray_address=ray_address,
            start_timeout_s=start_timeout_s,
            step_timeout_s=step_timeout_s,
            transport=transport,
            max_steps_in_flight=max_steps_in_flight,
        )
    if name == "inline":
        from dist_vlm.executor.inline import InlineExecutor

        return InlineExecutor(config, num_blocks=num_blocks, max_steps_in_flight=max_steps_in_flight)
    if name == "fake":
        from dist_vlm.executor.fake import FakeExecutor

        return FakeExecutor(
            num_blocks=1024 if num_blocks is None else num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
        )
    raise ValueError(f"executor = {name!r}: must be one of {', '.join(EXECUTORS)}")
