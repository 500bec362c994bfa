from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dist_vlm.config import (
    RULES,
    SECTION_OF,
    SECTIONS,
    CacheConfig,
    ConfigError,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    VisionConfig,
)
from dist_vlm.config_fields import rules_of

# The whole surface: a change here is a change of every user's files, flags and calls.
FIELDS = {
    "model": ["model", "tokenizer", "dtype", "load_format", "max_model_len", "seed"],
    "vision": [
        "image_input_type",
        "image_token_id",
        "image_input_shape",
        "image_feature_size",
        "image_processor",
        "image_processor_revision",
        "disable_image_processor",
        "max_image_pixels",
        "max_images_per_prompt",
        "feature_cache_tokens",
        "vision_data_parallel",
    ],
    "cache": [
        "block_size",
        "gpu_memory_utilization",
        "kv_cache_memory_gib",
        "num_gpu_blocks_override",
        "enable_prefix_caching",
    ],
    "scheduler": ["max_num_seqs", "max_num_batched_tokens", "max_steps_in_flight", "max_logprobs"],
    "parallel": [
        "tensor_parallel_size",
        "executor",
        "replicas",
        "num_nodes",
        "device",
        "ray_address",
        "transport",
        "engine_process",
        "start_timeout_s",
        "step_timeout_s",
        "max_restarts",
        "threads_per_rank",
        "kernels",
        "share_gpu",
        "collectives",
        "collectives_table",
        "halve_step_tokens",
    ],
    "scaling": [
        "app_name",
        "max_replicas",
        "target_requests_per_replica",
        "upscale_delay_s",
        "downscale_delay_s",
        "replica_health_period_s",
        "replica_health_timeout_s",
        "replica_drain_timeout_s",
    ],
    "observability": ["disable_log_stats"],
}
SEED_VISION = {"image_token_id": 32000, "image_input_shape": "1,3,336,336", "image_feature_size": 576}


def test_the_fields_are_the_known_ones() -> None:
    assert {name: list(rules_of(section)) for name, section in SECTIONS.items()} == FIELDS


def test_a_field_name_stands_in_one_section() -> None:
    counts = Counter(name for section in SECTIONS.values() for name in rules_of(section))
    assert [name for name, count in counts.items() if count > 1] == []
    assert list(RULES) == list(SECTION_OF) == [name for names in FIELDS.values() for name in names]


def test_every_field_has_help_and_a_default_its_rule_accepts() -> None:
    for section in SECTIONS.values():
        for field in dataclasses.fields(section):
            rule = field.metadata["rule"]
            assert len(rule.help) > 10
            if field.name != "model":
                assert rule.check(field.default) == field.default


def test_the_defaults_are_the_decided_ones() -> None:
    config = EngineConfig(model=ModelConfig(model="m"))
    assert (config.model.dtype, config.model.load_format, config.model.max_model_len) == ("auto", "auto", None)
    assert (config.cache.block_size, config.cache.gpu_memory_utilization) == (16, 0.9)
    assert (config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens) == (256, None)
    assert (config.parallel.tensor_parallel_size, config.parallel.executor) == (1, "ray")
    assert (config.parallel.start_timeout_s, config.parallel.step_timeout_s) == (300.0, 60.0)
    assert (config.vision.max_image_pixels, config.vision.max_images_per_prompt) == (67_108_864, 16)
    assert config.observability.disable_log_stats is True


def test_sections_are_frozen_and_equal_by_value() -> None:
    config = EngineConfig(model=ModelConfig(model="m"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.seed = 1  # type: ignore[misc]
    assert config == EngineConfig.from_fields(model="m")
    assert hash(config) == hash(EngineConfig.from_fields(model="m"))


def test_a_path_object_is_a_path() -> None:
    assert ModelConfig(model=Path("/models/m")).model == "/models/m"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_num_seqs", True),
        ("max_num_seqs", 0),
        ("max_num_seqs", -3),
        ("max_num_seqs", "8"),
        ("max_num_seqs", 8.0),
        ("max_num_batched_tokens", 0),
        ("block_size", 12),
        ("gpu_memory_utilization", 0),
        ("gpu_memory_utilization", 1.01),
        ("gpu_memory_utilization", math.nan),
        ("kv_cache_memory_gib", 0),
        ("kv_cache_memory_gib", math.inf),
        ("num_gpu_blocks_override", 0),
        ("tensor_parallel_size", 0),
        ("tensor_parallel_size", 65),
        ("tensor_parallel_size", None),
        ("executor", "mp"),
        ("device", "tpu"),
        ("kernels", "tritn"),
        ("start_timeout_s", 0),
        ("start_timeout_s", math.nan),
        ("step_timeout_s", -1),
        ("max_restarts", -1),
        ("threads_per_rank", 0),
        ("replicas", 0),
        ("num_nodes", 0),
        ("share_gpu", 1),
        ("collectives", "nccl"),
        ("collectives_table", 1),
        ("halve_step_tokens", 1),
        ("dtype", "float64"),
        ("load_format", "pt"),
        ("max_model_len", 0),
        ("seed", -1),
        ("seed", 2**63),
        ("image_token_id", -1),
        ("image_feature_size", 0),
        ("image_input_shape", (1, 3, 336)),
        ("image_input_type", "pixels"),
        ("max_image_pixels", 0),
        ("max_images_per_prompt", 0),
        ("disable_image_processor", None),
        ("image_processor_revision", "main"),
        ("ray_address", ""),
        ("ray_address", "ray://head:10001"),
        ("ray_address", "head"),
        ("ray_address", ":6379"),
        ("ray_address", "head:0"),
        ("ray_address", "head:65536"),
        ("ray_address", "head:" + "9" * 5000),
        ("ray_address", "head:²"),
        ("disable_log_stats", "yes"),
        ("tokenizer", ""),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="must be") as caught:
        EngineConfig.from_fields(model="m", **{name: value})
    assert caught.value.field == f"{SECTION_OF[name]}.{name}"
    assert str(caught.value).startswith(f"{SECTION_OF[name]}.{name} = ")


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:6379", "head.cluster:1", "[::1]:6379"])
def test_a_ray_address_is_auto_or_host_and_port(address: str) -> None:
    assert ParallelConfig(ray_address=address).ray_address == address


@pytest.mark.parametrize(("text", "kept"), [("half", "float16"), ("float", "float32"), ("bfloat16", "bfloat16")])
def test_a_type_has_the_short_names_of_old(text: str, kept: str) -> None:
    assert ModelConfig(model="m", dtype=text).dtype == kept


@pytest.mark.parametrize("missing", sorted(SEED_VISION))
def test_an_image_input_type_needs_the_three_others(missing: str) -> None:
    given: dict[str, Any] = {**SEED_VISION, "image_input_type": "pixel_values"}
    assert VisionConfig(**given).image_input_shape == (1, 3, 336, 336)
    del given[missing]
    with pytest.raises(ValueError, match=f"Specify .* together with image_input_type.*missing: {missing}"):
        VisionConfig(**given)


def test_an_image_token_id_of_zero_counts_as_missing() -> None:
    with pytest.raises(ValueError, match="Specify image_token_id"):
        VisionConfig(**{**SEED_VISION, "image_token_id": 0, "image_input_type": "image_features"})


def test_a_processor_that_is_not_loaded_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="image_processor='p' is not loaded"):
        VisionConfig(image_processor="p", disable_image_processor=True)


@pytest.mark.parametrize("given", [{"tensor_parallel_size": 2}, {"replicas": 2}])
def test_one_process_runs_one_rank(given: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be 1 with parallel.executor = 'inline'"):
        EngineConfig.from_fields(model="m", executor="inline", **given)


def test_nodes_hold_whole_replicas() -> None:
    assert ParallelConfig(replicas=2, num_nodes=2).num_nodes == 2
    with pytest.raises(ConfigError, match="parallel.num_nodes = 2: must be at most parallel.replicas, which is 1"):
        ParallelConfig(num_nodes=2)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: EngineConfig.from_fields(), "model.model: a checkpoint directory is needed"),
        (lambda: EngineConfig.from_fields(model="m", max_seqs=3), "max_seqs = 3: unknown field"),
        (lambda: EngineConfig(model={"model": "m"}), "must be a ModelConfig"),  # type: ignore[arg-type]
        (lambda: EngineConfig(model=ModelConfig(model="m"), cache=None), "must be a CacheConfig"),  # type: ignore[arg-type]
    ],
)
def test_a_config_is_made_of_its_sections(build: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        build()


def test_fields_and_replace_are_flat() -> None:
    config = EngineConfig.from_fields(model="m", block_size=8)
    changed = config.replace(max_num_seqs=3, image_input_shape="1,3,56,56")
    assert changed.cache == CacheConfig(block_size=8)
    assert (changed.scheduler.max_num_seqs, changed.vision.image_input_shape) == (3, (1, 3, 56, 56))
    assert EngineConfig.from_fields(**changed.fields()) == changed
    with pytest.raises(ConfigError, match="scheduler.max_num_seqs = 0"):
        config.replace(max_num_seqs=0)


def test_configuration_imports_nothing_heavy() -> None:
    code = "import sys, dist_vlm.config, dist_vlm.config_load, dist_vlm.engine.arg_utils\n"
    code += "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
