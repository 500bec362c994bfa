from __future__ import annotations

import dataclasses

import pytest

from dist_vlm.config import EngineConfig, resolve
from dist_vlm.engine.feature_budget import FeatureBudget, feature_budget
from dist_vlm.engine.rank_config import rank_config
from dist_vlm.workers.models import read_spec


@pytest.fixture(scope="module")
def budget(facts_7b):
    """The budget of the 7b model (576 rows of 4096 numbers an image) with some fields changed."""

    def of(**fields):
        defaults = {"device": "cpu", "dtype": "bfloat16"}
        config = resolve(EngineConfig.from_fields(model=str(facts_7b), **(defaults | fields)))
        return feature_budget(config, read_spec(config.model.model))

    return of


@pytest.mark.parametrize(
    ("max_num_batched_tokens", "dtype", "rows"),
    [
        (2048, "bfloat16", 32768),
        (8192, "bfloat16", 4 * 8192),
        (16384, "bfloat16", 4 * 16384),
        (100, "bfloat16", 32768),
        (65536, "bfloat16", (1 << 30) // (4096 * 2)),
        (65536, "float16", (1 << 30) // (4096 * 2)),
        (32768, "float32", (1 << 30) // (4096 * 4)),
        # What a step needs goes before the gigabyte: 347.2 images.
        (200_000, "bfloat16", (348 + 1) * 576),
    ],
)
def test_some_steps_worth_are_kept_by_default(budget, max_num_batched_tokens, dtype, rows):
    found = budget(max_num_batched_tokens=max_num_batched_tokens, dtype=dtype)
    assert found == FeatureBudget(rows, keeps_unneeded=True)


@pytest.mark.parametrize(
    ("feature_cache_tokens", "max_num_batched_tokens", "rows"),
    [
        (0, 8192, (15 + 1) * 576),
        (1, 8192, (15 + 1) * 576),
        (16 * 576, 8192, 16 * 576),
        (16 * 576 + 1, 8192, 16 * 576 + 1),
        (0, 10, 2 * 576),
        (0, 576, 2 * 576),
        (0, 577, 3 * 576),
        (10_000_000, 8192, 10_000_000),
    ],
)
def test_a_number_is_taken_but_never_less_than_a_step_needs(budget, feature_cache_tokens, max_num_batched_tokens, rows):
    found = budget(feature_cache_tokens=feature_cache_tokens, max_num_batched_tokens=max_num_batched_tokens)
    assert found == FeatureBudget(rows, keeps_unneeded=feature_cache_tokens > 0)


@pytest.mark.parametrize("budget_tokens", [1, 2, 5, 6, 7, 11, 12, 13, 30])
def test_the_least_holds_every_image_that_a_step_of_one_sequence_touches(facts_7b, budget_tokens):
    """Counted by hand over all places where a slice of images of six rows, side by side, may begin."""
    config = resolve(
        EngineConfig.from_fields(
            model=str(facts_7b), device="cpu", max_num_batched_tokens=budget_tokens, feature_cache_tokens=0
        )
    )
    spec = dataclasses.replace(read_spec(config.model.model), image_feature_size=6)
    touched = max(len({position // 6 for position in range(start, start + budget_tokens)}) for start in range(6))
    assert touched * 6 <= feature_budget(config, spec).capacity_rows <= (touched + 1) * 6


def test_a_model_without_images_holds_none(facts_7b):
    config = resolve(EngineConfig.from_fields(model=str(facts_7b), device="cpu"))
    spec = dataclasses.replace(read_spec(config.model.model), image_feature_size=None)
    assert feature_budget(config, spec) == FeatureBudget(0, keeps_unneeded=False)


def test_the_ranks_are_told_the_same(facts_7b):
    for data_parallel in (True, False):
        config = resolve(
            EngineConfig.from_fields(
                model=str(facts_7b), device="cpu", feature_cache_tokens=20_000, vision_data_parallel=data_parallel
            )
        )
        ranks = rank_config(config, read_spec(config.model.model))
        assert (ranks.feature_cache_tokens, ranks.vision_data_parallel) == (20_000, data_parallel)
