"""Whether a request can ever run, with everything there is to itself."""

from __future__ import annotations

from dist_vlm.sched.block_pool import BlockPool
from dist_vlm.sched.features import FeatureTable
from dist_vlm.sched.request import Request


def check_fits(request: Request, pool: BlockPool, features: FeatureTable) -> None:
    """Raises `ValueError` for a request that could never run."""
    if not request.prompt_token_ids:
        raise ValueError("the prompt has no tokens; at least 1 is needed")
    if request.max_tokens < 1:
        raise ValueError(f"max_tokens = {request.max_tokens}: must be at least 1")
    if len(request.output_token_ids) >= request.max_tokens:
        raise ValueError(f"{len(request.output_token_ids)} tokens are answered; max_tokens is {request.max_tokens}")
    reason = blocking_resource(request, pool, features)
    if reason is not None:
        raise ValueError(reason)


def blocking_resource(request: Request, pool: BlockPool, features: FeatureTable) -> str | None:
    """The resource of which a request needs more than there is in all; None if it fits."""
    longest = len(request.prompt_token_ids) + request.max_tokens
    capacity = pool.num_blocks * pool.block_size
    if longest > capacity:
        return f"prompt and max_tokens are {longest} tokens; the KV cache holds {capacity}"
    rows = max((span.count for span in request.images), default=0)
    if features.capacity_rows is not None and rows > features.capacity_rows:
        return f"an image has {rows} feature rows; the feature cache holds {features.capacity_rows}"
    return None
