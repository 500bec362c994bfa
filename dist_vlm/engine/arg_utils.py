"""The engine arguments under the names that callers of vLLM 0.5.0 know.

Every engine flag of that release is a field of the configuration, accepted because ignoring it changes nothing here, or
refused by name with what to use instead. Nothing is dropped silently.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_vlm.config import RULES, ConfigError, EngineConfig
from dist_vlm.config_fields import nearest
from dist_vlm.config_load import add_config_flags, flag_of

VLM_FIELDS = (
    "image_input_type",
    "image_token_id",
    "image_input_shape",
    "image_feature_size",
    "image_processor",
    "image_processor_revision",
    "disable_image_processor",
)

# Accepted with any value: each only tunes machinery that does not exist here, or is on anyway.
HARMLESS = frozenset(
    {
        "disable_custom_all_reduce",  # True also means collectives="group"
        "disable_log_requests",  # no prompt is logged unless log_prompts asks for it
        "disable_sliding_window",  # no served model has one
        "enforce_eager",
        "fully_sharded_loras",  # this and the LoRA limits below mean nothing while enable_lora is refused
        "long_lora_scaling_factors",
        "lora_dtype",
        "lora_extra_vocab_size",
        "max_context_len_to_capture",
        "max_cpu_loras",
        "max_log_len",
        "max_lora_rank",
        "max_loras",
        "max_parallel_loading_workers",  # ranks read only their slices, all at once
        "max_seq_len_to_capture",
        "tokenizer_pool_extra_config",
        "tokenizer_pool_size",
        "tokenizer_pool_type",
        "use_v2_block_manager",  # there is one block manager
        "worker_use_ray",  # the default executor
    }
)


@dataclass(frozen=True)
class Refusal:
    """Only the values in `accepted` may be given; `instead` is what a caller can do about any other."""

    accepted: tuple[object, ...]
    instead: str

    @property
    def way_out(self) -> str:
        """What may be given on a command line."""
        others = " or ".join(str(one) for one in self.accepted if one is not None and one is not False)
        return f"leave it out, or give {others}" if others else "leave it out"


_LOCAL = "give `model` the path of a local checkpoint directory; nothing is downloaded and a directory has no revisions"
_NO_SPECULATION = "speculative decoding is not served; leave it out"
_NO_LORA = "LoRA adapters are not served; merge the adapter into the checkpoint"
_NO_QUANTIZATION = "quantized weights and caches are not served; use dtype='bfloat16'"

REFUSED: Mapping[str, Refusal] = {
    "code_revision": Refusal((None,), _LOCAL),
    "distributed_executor_backend": Refusal(
        (None, "ray"), "Ray places the ranks; use executor='ray', or executor='inline' for one rank in this process"
    ),
    "download_dir": Refusal((None,), _LOCAL),
    "enable_chunked_prefill": Refusal((None, True), "prompts are always prefilled in chunks; leave it out"),
    "enable_lora": Refusal((False,), _NO_LORA),
    "engine_use_ray": Refusal((False,), "only ranks run in Ray; the engine is in this process or one of its own"),
    "guided_decoding_backend": Refusal(("outlines",), "guided decoding is not served; leave it out"),
    "kv_cache_dtype": Refusal(("auto",), _NO_QUANTIZATION),
    "model_loader_extra_config": Refusal((None,), "use load_format='safetensors' or 'dummy'"),
    "ngram_prompt_lookup_max": Refusal((None,), _NO_SPECULATION),
    "ngram_prompt_lookup_min": Refusal((None,), _NO_SPECULATION),
    "num_lookahead_slots": Refusal((0,), _NO_SPECULATION),
    "num_speculative_tokens": Refusal((None,), _NO_SPECULATION),
    "pipeline_parallel_size": Refusal((1,), "layers are not split over ranks; use tensor_parallel_size"),
    "preemption_mode": Refusal((None, "recompute"), "a preempted sequence is always recomputed"),
    "qlora_adapter_name_or_path": Refusal((None,), _NO_LORA),
    "quantization": Refusal((None,), _NO_QUANTIZATION),
    "quantization_param_path": Refusal((None,), _NO_QUANTIZATION),
    "ray_workers_use_nsight": Refusal((False,), "profile the ranks from outside"),
    "revision": Refusal((None,), _LOCAL),
    "rope_scaling": Refusal((None,), "write it into the checkpoint's config.json"),
    "rope_theta": Refusal((None,), "write it into the checkpoint's config.json"),
    "scheduler_delay_factor": Refusal((0.0,), "a waiting prompt is never delayed; leave it out"),
    "served_model_name": Refusal((None,), "it names a model in the server's answers, and this is not a server"),
    "skip_tokenizer_init": Refusal((False,), "the tokenizer is always loaded; pass prompt_token_ids to skip its use"),
    "speculative_disable_by_batch_size": Refusal((None,), _NO_SPECULATION),
    "speculative_max_model_len": Refusal((None,), _NO_SPECULATION),
    "speculative_model": Refusal((None,), _NO_SPECULATION),
    "swap_space": Refusal((4, 0), "a preempted sequence is recomputed, never swapped to host memory; leave it out"),
    "tokenizer_mode": Refusal(("auto",), "the fast tokenizer is always used"),
    "tokenizer_revision": Refusal((None,), _LOCAL),
    "trust_remote_code": Refusal((False,), "code of a checkpoint is never run; the served families are built in"),
}

# Flags of that release's server alone. Those that are not here are fields of the configuration's section `server`.
SERVER_REFUSED: Mapping[str, Refusal] = {
    "lora_modules": Refusal((None,), _NO_LORA),
    "middleware": Refusal((None,), "the server loads no code by name; let a proxy in front of it do the work"),
}


def engine_config(**arguments: Any) -> EngineConfig:
    """The configuration for flat keyword arguments, as `LLM(...)` takes them.

    Raises ConfigError (a ValueError) naming the argument: an unknown one with the nearest known name, one that is not
    served with what to use instead, or a wrong value with what is allowed.
    """
    values = {}
    for name, value in arguments.items():
        if name in RULES:
            values[name] = value
        elif name in REFUSED:
            _check_accepted(name, value)
        elif name not in HARMLESS:
            known = sorted({*RULES, *REFUSED, *HARMLESS})
            raise ConfigError(f"unknown argument{nearest(name, known)}", field=name, value=value)
    if arguments.get("disable_custom_all_reduce") is True and values.setdefault("collectives", "group") != "group":
        problem = f"contradicts collectives={values['collectives']!r}; give only collectives"
        raise ConfigError(problem, field="disable_custom_all_reduce", value=True)
    if arguments.get("distributed_executor_backend") == "ray" and values.setdefault("executor", "ray") != "ray":
        problem = f"contradicts executor={values['executor']!r}; give only executor"
        raise ConfigError(problem, field="distributed_executor_backend", value="ray")
    try:
        return EngineConfig.from_fields(**values)
    except ConfigError as error:
        raise _under_flat_name(error) from None


def _under_flat_name(error: ConfigError) -> ConfigError:
    """The error with the argument's name as the caller wrote it, without the section."""
    return ConfigError(error.problem, field=error.field.rpartition(".")[2], value=error.value)


def _check_accepted(name: str, value: object) -> None:
    refusal = REFUSED[name]
    if any(type(value) is type(one) and value == one for one in refusal.accepted) or _same_number(value, refusal):
        return
    accepted = " or ".join(repr(one) for one in refusal.accepted)
    raise ConfigError(f"is not served (only {accepted} is accepted): {refusal.instead}", field=name, value=value)


def check_flag(name: str, text: str | None) -> None:
    """Raises `ConfigError`, with what to use instead, where a command line's text is no accepted value of a flag in
    `REFUSED` or `SERVER_REFUSED`. text: None for a flag that takes no value."""
    refusal = {**REFUSED, **SERVER_REFUSED}[name]
    if any(_reads_as("true" if text is None else text, one) for one in refusal.accepted):
        return
    flag, problem = flag_of(name), f"is not served ({refusal.way_out}): {refusal.instead}"
    raise ConfigError(f"{flag} {problem}") if text is None else ConfigError(problem, value=text, source=flag)


def _reads_as(text: str, value: object) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(text) == value
        except ValueError:
            return False
    return text.lower() == str(value).lower()


def _same_number(value: object, refusal: Refusal) -> bool:
    """4.0 for 4: whole numbers may be written as floats, but True is no 1."""
    numbers = [one for one in refusal.accepted if isinstance(one, int | float) and not isinstance(one, bool)]
    return isinstance(value, int | float) and not isinstance(value, bool) and value in numbers


def _vlm_engine_args_parser() -> argparse.ArgumentParser:
    """The flags that concern pictures alone, as documentation generators read them."""
    parser = argparse.ArgumentParser(prog="dist-vlm", add_help=True, allow_abbrev=False)
    add_config_flags(parser, VLM_FIELDS)
    return parser
