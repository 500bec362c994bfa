"""How many rows of encoded images a rank may hold: the one place that decides it."""

from __future__ import annotations

from dataclasses import dataclass

from dist_vlm.config import EngineConfig
from dist_vlm.workers.models import ModelSpec

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_DEFAULT_STEPS = 4
_DEFAULT_ROWS = 32768
_DEFAULT_LIMIT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class FeatureBudget:
    """What the scheduler may leave on each rank.

    capacity_rows: most feature rows held at once, those of the step being run included; 0 for a model without images.
    keeps_unneeded: whether the features of an image that no request needs stay until others want the room.
    """

    capacity_rows: int
    keeps_unneeded: bool


def feature_budget(config: EngineConfig, spec: ModelSpec) -> FeatureBudget:
    """The budget of a resolved configuration.

    What one step needs at most is the least: the rows that a whole step's tokens can lie in. A smaller
    `feature_cache_tokens` means that least; without one, 32768 are kept, or four steps' worth where that is more, of at
    most 1 GiB.
    """
    size = spec.image_feature_size
    if size is None:
        return FeatureBudget(0, keeps_unneeded=False)
    assert config.scheduler.max_num_batched_tokens is not None, "resolve() decides it"
    step_rows = max(config.scheduler.max_num_batched_tokens, size)
    # A run of tokens that begins and ends inside an image touches one more image than it could fill.
    least = (-(-step_rows // size) + 1) * size
    wanted = config.vision.feature_cache_tokens
    if wanted is None:
        row_bytes = spec.hidden_size * ITEM_BYTES[config.model.dtype]
        wanted = min(max(_DEFAULT_ROWS, _DEFAULT_STEPS * step_rows), _DEFAULT_LIMIT_BYTES // row_bytes)
    return FeatureBudget(max(wanted, least), keeps_unneeded=wanted > 0)
