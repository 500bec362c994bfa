"""How many KV blocks all ranks allocate."""

from __future__ import annotations

from collections.abc import Sequence

from dist_vlm.executor.base import StartError
from dist_vlm.workers.config import LoadReport


def choose_num_blocks(reports: Sequence[LoadReport], wanted: int | None) -> int:
    """The smallest number over the ranks, or `wanted` where that fits. Raises `StartError` at stage "allocate"."""
    tightest = min(reports, key=lambda report: report.num_blocks)
    if tightest.num_blocks < 1:
        raise StartError(
            "allocate", f"no KV block of {tightest.kv_block_bytes} bytes fits the rank's memory", tightest.rank
        )
    if wanted is None:
        return tightest.num_blocks
    if wanted > tightest.num_blocks:
        raise StartError("allocate", f"{wanted} KV blocks asked for, {tightest.num_blocks} fit", tightest.rank)
    return wanted
