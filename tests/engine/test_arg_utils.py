from __future__ import annotations

import argparse
from typing import Any

import pytest

from dist_vlm.config import RULES, ConfigError, EngineConfig
from dist_vlm.config_fields import rules_of
from dist_vlm.config_server import ServerConfig
from dist_vlm.engine.arg_utils import (
    HARMLESS,
    REFUSED,
    SERVER_REFUSED,
    VLM_FIELDS,
    _vlm_engine_args_parser,
    check_flag,
    engine_config,
)

# Every engine flag of vLLM 0.5.0.post1 with the default its source gives it, as keyword arguments.
OLD_FLAGS: dict[str, Any] = {
    "image_input_type": None,
    "image_token_id": None,
    "image_input_shape": None,
    "image_feature_size": None,
    "image_processor": None,
    "image_processor_revision": None,
    "disable_image_processor": False,
    "model": "facebook/opt-125m",
    "tokenizer": None,
    "skip_tokenizer_init": False,
    "revision": None,
    "code_revision": None,
    "tokenizer_revision": None,
    "tokenizer_mode": "auto",
    "trust_remote_code": False,
    "download_dir": None,
    "load_format": "auto",
    "dtype": "auto",
    "kv_cache_dtype": "auto",
    "quantization_param_path": None,
    "max_model_len": None,
    "guided_decoding_backend": "outlines",
    "distributed_executor_backend": None,
    "worker_use_ray": False,
    "pipeline_parallel_size": 1,
    "tensor_parallel_size": 1,
    "max_parallel_loading_workers": None,
    "ray_workers_use_nsight": False,
    "block_size": 16,
    "enable_prefix_caching": False,
    "disable_sliding_window": False,
    "use_v2_block_manager": False,
    "num_lookahead_slots": 0,
    "seed": 0,
    "swap_space": 4,
    "gpu_memory_utilization": 0.9,
    "num_gpu_blocks_override": None,
    "max_num_batched_tokens": None,
    "max_num_seqs": 256,
    "max_logprobs": 20,
    "disable_log_stats": False,
    "quantization": None,
    "rope_scaling": None,
    "rope_theta": None,
    "enforce_eager": False,
    "max_context_len_to_capture": None,
    "max_seq_len_to_capture": 8192,
    "disable_custom_all_reduce": False,
    "tokenizer_pool_size": 0,
    "tokenizer_pool_type": "ray",
    "tokenizer_pool_extra_config": None,
    "enable_lora": False,
    "max_loras": 1,
    "max_lora_rank": 16,
    "lora_extra_vocab_size": 256,
    "lora_dtype": "auto",
    "long_lora_scaling_factors": None,
    "max_cpu_loras": None,
    "fully_sharded_loras": False,
    "device": "auto",
    "scheduler_delay_factor": 0.0,
    "enable_chunked_prefill": None,
    "speculative_model": None,
    "num_speculative_tokens": None,
    "speculative_max_model_len": None,
    "speculative_disable_by_batch_size": None,
    "ngram_prompt_lookup_max": None,
    "ngram_prompt_lookup_min": None,
    "model_loader_extra_config": None,
    "preemption_mode": None,
    "served_model_name": None,
    "qlora_adapter_name_or_path": None,
    "engine_use_ray": False,
    "disable_log_requests": False,
    "max_log_len": None,
}


def test_every_old_flag_is_decided_once() -> None:
    homes = [set(RULES), set(REFUSED), set(HARMLESS)]
    for name in OLD_FLAGS:
        assert sum(name in home for home in homes) == 1, name
    assert (set(REFUSED) | set(HARMLESS)) <= set(OLD_FLAGS)
    assert not set(REFUSED) & set(HARMLESS)


def test_all_old_defaults_together_are_accepted() -> None:
    # The defaults that differ here: the calling class itself changes disable_log_stats, and caching is on.
    config = engine_config(**OLD_FLAGS)
    expected = {"disable_log_stats": False, "enable_prefix_caching": False}
    assert config == EngineConfig.from_fields(model="facebook/opt-125m", **expected)


def test_caching_and_logprobs_are_fields() -> None:
    config = engine_config(model="m", enable_prefix_caching=False, max_logprobs=3)
    assert (config.cache.enable_prefix_caching, config.scheduler.max_logprobs) == (False, 3)
    with pytest.raises(ConfigError, match="max_logprobs = -1"):
        engine_config(model="m", max_logprobs=-1)


def test_the_offline_example_of_the_time_is_accepted() -> None:
    config = engine_config(
        model="/models/m",
        image_input_type="pixel_values",
        image_token_id=32000,
        image_input_shape="1,3,336,336",
        image_feature_size=576,
    )
    assert config.vision.image_input_shape == (1, 3, 336, 336)
    assert config.vision.image_input_type == "pixel_values"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enforce_eager", True),
        ("disable_custom_all_reduce", False),
        ("max_context_len_to_capture", 4096),
        ("max_seq_len_to_capture", 1),
        ("use_v2_block_manager", True),
        ("worker_use_ray", True),
        ("swap_space", 0),
        ("swap_space", 4.0),
        ("enable_chunked_prefill", True),
        ("preemption_mode", "recompute"),
        ("distributed_executor_backend", "ray"),
        ("disable_log_requests", True),
        ("max_log_len", 10),
        ("max_num_batched_tokens", None),
    ],
)
def test_what_changes_nothing_is_accepted(name: str, value: Any) -> None:
    assert engine_config(model="m", **{name: value}) == EngineConfig.from_fields(model="m")


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("enable_chunked_prefill", False, "always prefilled in chunks"),
        ("distributed_executor_backend", "mp", "executor='inline'"),
        ("pipeline_parallel_size", 2, "tensor_parallel_size"),
        ("pipeline_parallel_size", True, "tensor_parallel_size"),
        ("trust_remote_code", True, "never run"),
        ("trust_remote_code", 0, "never run"),
        ("tokenizer_mode", "slow", "fast tokenizer"),
        ("skip_tokenizer_init", True, "prompt_token_ids"),
        ("revision", "main", "local checkpoint directory"),
        ("download_dir", "/cache", "local checkpoint directory"),
        ("quantization", "awq", "bfloat16"),
        ("kv_cache_dtype", "fp8", "bfloat16"),
        ("swap_space", 8, "recomputed"),
        ("swap_space", None, "recomputed"),
        ("preemption_mode", "swap", "recomputed"),
        ("enable_lora", True, "merge the adapter"),
        ("speculative_model", "m2", "leave it out"),
        ("guided_decoding_backend", "lm-format-enforcer", "leave it out"),
        ("rope_scaling", {"type": "linear"}, "config.json"),
    ],
)
def test_what_is_not_served_is_refused_with_what_to_use(name: str, value: Any, instead: str) -> None:
    with pytest.raises(ConfigError) as caught:
        engine_config(model="m", **{name: value})
    assert str(caught.value).startswith(f"{name} = {value!r}: is not served")
    assert instead in str(caught.value)


def test_without_the_custom_all_reduce_the_group_adds_up() -> None:
    assert engine_config(model="m", disable_custom_all_reduce=True).parallel.collectives == "group"
    with pytest.raises(ConfigError, match="disable_custom_all_reduce.*contradicts collectives='strict'"):
        engine_config(model="m", disable_custom_all_reduce=True, collectives="strict")


def test_every_refusal_refuses_something() -> None:
    for name in REFUSED:
        with pytest.raises(ConfigError, match=f"^{name} = .* is not served"):
            engine_config(model="m", **{name: object()})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("tensor_paralel_size", "tensor_parallel_size"),
        ("enforce_eagre", "enforce_eager"),
        ("max_num_seq", "max_num_seqs"),
    ],
)
def test_an_unknown_argument_is_told_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"{name} = 1: unknown argument; the nearest is {nearest}"):
        engine_config(model="m", **{name: 1})


@pytest.mark.parametrize("name", [name for name in rules_of(ServerConfig) if name not in OLD_FLAGS])
def test_a_field_of_the_server_is_no_argument(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = 1: unknown argument"):
        engine_config(model="m", **{name: 1})


def test_the_name_for_clients_is_no_argument_either() -> None:
    with pytest.raises(ConfigError, match="^served_model_name = 'n': is not served .* this is not a server"):
        engine_config(model="m", served_model_name="n")


@pytest.mark.parametrize("name", [*REFUSED, *SERVER_REFUSED])
def test_a_refused_flag_says_what_may_be_given(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_flag(name, "something else")
    flag = "--" + name.replace("_", "-")
    assert str(caught.value).startswith(f"{flag} = 'something else': is not served (leave it out")
    for accepted in {**REFUSED, **SERVER_REFUSED}[name].accepted:
        check_flag(name, str(accepted))


def test_a_switch_is_refused_without_a_value() -> None:
    with pytest.raises(ConfigError, match="^--enable-lora is not served .leave it out.: LoRA adapters are not served"):
        check_flag("enable_lora", None)
    check_flag("enable_chunked_prefill", None)


def test_a_wrong_value_is_named_as_the_caller_wrote_it() -> None:
    with pytest.raises(ConfigError, match=r"^max_num_seqs = 0: must be an integer, at least 1$"):
        engine_config(model="m", max_num_seqs=0)
    with pytest.raises(ConfigError, match=r"^load_format = 'pt': must be one of auto, safetensors, dummy$"):
        engine_config(model="m", load_format="pt")
    with pytest.raises(ConfigError, match=r"^model: a checkpoint directory is needed$"):
        engine_config(seed=1)


def test_one_executor_can_be_asked_for() -> None:
    with pytest.raises(ConfigError, match="distributed_executor_backend = 'ray': contradicts executor='inline'"):
        engine_config(model="m", distributed_executor_backend="ray", executor="inline")


def test_the_picture_flags_have_a_parser_of_their_own() -> None:
    parser = _vlm_engine_args_parser()
    assert isinstance(parser, argparse.ArgumentParser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    expected = {"--" + name.replace("_", "-") for name in VLM_FIELDS}
    assert flags - {"-h", "--help", "--no-disable-image-processor"} == expected
    assert len(expected) == 7
    for name in VLM_FIELDS:
        assert RULES[name].help in " ".join(parser.format_help().split()).replace("- ", "-")
