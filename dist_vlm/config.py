"""The configuration of an engine: frozen sections whose fields YAML, the command line and Python keywords share.

Field names are unique over all sections, so `parallel.tensor_parallel_size` in YAML, `--tensor-parallel-size` on the
command line and `tensor_parallel_size=` in Python are one thing. Nothing here imports torch, ray or transformers.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_vlm.config_fields import ConfigError, Rule, check_section, option, rules_of
from dist_vlm.config_scaling import ScalingConfig

__all__ = [
    "CacheConfig",
    "ConfigError",
    "EngineConfig",
    "ModelConfig",
    "ObservabilityConfig",
    "ParallelConfig",
    "ScalingConfig",
    "SchedulerConfig",
    "VisionConfig",
    "resolve",
]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    model: str = option("directory", help="directory of the checkpoint")
    tokenizer: str | None = option("directory", None, help="directory of the tokenizer (none: the model's)")
    dtype: str = option(
        "str",
        "auto",
        help="type of weights and KV cache (auto: the checkpoint's)",
        choices=("auto", "float32", "bfloat16", "float16"),
        aliases={"float": "float32", "half": "float16"},
    )
    load_format: str = option(
        "str",
        "auto",
        help="where weights come from (auto: safetensors; dummy: random numbers, for benchmarks)",
        choices=("auto", "safetensors", "dummy"),
    )
    max_model_len: int | None = option(
        "int", None, help="longest sequence, prompt and answer, in tokens (none: the checkpoint's limit)", low=1
    )
    seed: int = option("int", 0, help="seed of everything random in the engine", low=0, high=2**63 - 1)

    def __post_init__(self) -> None:
        check_section(self, "model")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    image_input_type: str | None = option(
        "str",
        None,
        help="the only form of picture to accept (none: pictures and vision-tower features alike)",
        choices=("pixel_values", "image_features"),
    )
    image_token_id: int | None = option(
        "int", None, help="vocabulary id of the image placeholder (none: the checkpoint's)", low=0
    )
    image_input_shape: tuple[int, ...] | None = option(
        "shape", None, help="shape of one preprocessed picture: 1, channels, height, width (none: the checkpoint's)"
    )
    image_feature_size: int | None = option(
        "int", None, help="placeholder tokens of one picture (none: the checkpoint's)", low=1
    )
    image_processor: str | None = option("directory", None, help="directory of the image processor (none: the model's)")
    image_processor_revision: str | None = option(
        "str", None, help="revision of the image processor; a local directory has none, so only none is accepted"
    )
    disable_image_processor: bool = option(
        "bool", False, help="load no image processor, and accept only preprocessed tensors"
    )
    max_image_pixels: int = option("int", 67_108_864, help="largest picture accepted, in decoded pixels", low=1)
    max_images_per_prompt: int = option("int", 16, help="most pictures in one prompt", low=1)
    feature_cache_tokens: int | None = option(
        "int",
        None,
        help="encoded pictures kept for later requests, in placeholder tokens (none: 32768 or four steps' worth, of at "
        "most 1 GiB; 0: none kept)",
        low=0,
    )
    vision_data_parallel: bool = option(
        "bool", True, help="split a step's pictures over the ranks (false: every rank encodes all of them)"
    )

    def __post_init__(self) -> None:
        check_section(self, "vision")
        needed = ("image_token_id", "image_input_shape", "image_feature_size")
        missing = [name for name in needed if not getattr(self, name)]
        if self.image_input_type is not None and missing:
            problem = f"Specify {', '.join(needed)} together with image_input_type (missing: {', '.join(missing)})"
            raise ConfigError(problem, field="vision.image_input_type", value=self.image_input_type)
        if self.image_processor_revision is not None:
            problem = "must be none: the processor is read from a local directory, which has no revisions"
            raise ConfigError(problem, field="vision.image_processor_revision", value=self.image_processor_revision)
        if self.disable_image_processor and self.image_processor is not None:
            text = f"image_processor={self.image_processor!r} is not loaded, because disable_image_processor is set"
            warnings.warn(text, UserWarning, stacklevel=3)


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    block_size: int = option("int", 16, help="token positions in a block of the KV cache", choices=(8, 16, 32))
    gpu_memory_utilization: float = option(
        "float", 0.9, help="share of each GPU's memory the engine may fill", above=0, high=1
    )
    kv_cache_memory_gib: float | None = option(
        "float", None, help="size of one rank's KV cache in GiB (none: what is left on a GPU, 1.0 on a CPU)", above=0
    )
    num_gpu_blocks_override: int | None = option(
        "int", None, help="number of KV blocks of each rank, in place of any computed one", low=1
    )
    enable_prefix_caching: bool = option(
        "bool", True, help="keep KV blocks of ended requests for others that begin with the same tokens and pictures"
    )

    def __post_init__(self) -> None:
        check_section(self, "cache")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    max_num_seqs: int = option("int", 256, help="most sequences running at the same time", low=1)
    max_num_batched_tokens: int | None = option(
        "int",
        None,
        help="token budget of one step (none: 2048 for each GPU of a replica, at least max_num_seqs)",
        low=1,
    )
    max_steps_in_flight: int = option(
        "int", 2, help="steps sent to the ranks before the first one's tokens are known", low=1, high=4
    )
    max_logprobs: int = option("int", 20, help="most alternatives a request may ask for with each token", low=0)

    def __post_init__(self) -> None:
        check_section(self, "scheduler")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tensor_parallel_size: int = option(
        "int", 1, help="ranks that share the language model", low=1, high=64, short_flag="-tp"
    )
    executor: str = option(
        "str",
        "ray",
        help="how ranks run (inline: one rank in this process; fake: scripted answers, for tests)",
        choices=("ray", "inline", "fake"),
    )
    replicas: int = option("int", 1, help="independent copies of the tensor-parallel group", low=1)
    num_nodes: int = option("int", 1, help="nodes the replicas spread over; a group stays on one node", low=1)
    device: str = option(
        "str",
        "auto",
        help="where ranks compute (auto: cuda if this machine has an NVIDIA GPU, else cpu)",
        choices=("auto", "cpu", "cuda"),
    )
    ray_address: str | None = option(
        "str",
        None,
        help="Ray cluster to join, auto or HOST:PORT (none: the Ray of this process, else a private one on 127.0.0.1)",
    )
    transport: str = option(
        "str",
        "ray",
        help="how plans reach the ranks (ray: a compiled graph; direct: unix sockets, on the driver's machine)",
        choices=("ray", "direct"),
    )
    engine_process: bool = option(
        "bool", False, help="AsyncLLM: run the step loop in a process of its own, beside the one that serves requests"
    )
    start_timeout_s: float = option("float", 300.0, help="seconds the ranks have to start", above=0)
    step_timeout_s: float = option("float", 60.0, help="seconds one step may take", above=0)
    max_restarts: int | None = option(
        "int",
        None,
        help="how often in an hour lost ranks are started again and all requests go on (none: 2, or 0 with several "
        "replicas, where they go on in another)",
        low=0,
    )
    threads_per_rank: int | None = option(
        "int", None, help="torch threads of a CPU rank (none: cores divided by ranks)", low=1, high=1024
    )
    kernels: str = option(
        "str",
        "auto",
        help="implementation of the ops (auto: triton on a GPU, cpp on a CPU with a compiler, else torch)",
        choices=("auto", "reference", "torch", "cpp", "triton"),
    )
    share_gpu: bool = option("bool", False, help="let several ranks use one GPU, to test the multi-rank path")
    collectives: str = option(
        "str",
        "fused",
        help="what adds up the ranks' parts (fused: kernels over the ranks' memory, or group if they fail the start's "
        "test; strict: those or no start; group: NCCL or gloo)",
        choices=("fused", "strict", "group"),
    )
    collectives_table: str | None = option(
        "str", None, help="JSON file of `dist-vlm tune-collectives` (none: the package's table for the GPU)"
    )
    halve_step_tokens: int | None = option(
        "int",
        None,
        help="with several ranks, compute steps of at least so many tokens in two halves, one while the other is "
        "added up (none: never)",
        low=2,
    )

    def __post_init__(self) -> None:
        check_section(self, "parallel")
        for name in ("tensor_parallel_size", "replicas"):
            if self.executor == "inline" and getattr(self, name) != 1:
                problem = f"must be 1 with parallel.executor = 'inline', which is one process; allowed for {name}: 1"
                raise ConfigError(problem, field=f"parallel.{name}", value=getattr(self, name))
        if self.num_nodes > self.replicas:
            problem = (
                f"must be at most parallel.replicas, which is {self.replicas}: the ranks of one replica share a node"
            )
            raise ConfigError(problem, field="parallel.num_nodes", value=self.num_nodes)
        if self.ray_address is not None and not _is_ray_address(self.ray_address):
            problem = "must be auto, HOST:PORT with a port of 1 to 65535, or none"
            raise ConfigError(problem, field="parallel.ray_address", value=self.ray_address)


@dataclass(frozen=True, kw_only=True)
class ObservabilityConfig:
    disable_log_stats: bool = option("bool", True, help="log no statistics of the running engine")

    def __post_init__(self) -> None:
        check_section(self, "observability")


def _is_ray_address(text: str) -> bool:
    host, colon, port = text.rpartition(":")
    plain_host = bool(host) and "/" not in host and not any(ch.isspace() for ch in host)
    valid_port = port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 65535
    return text == "auto" or (bool(colon) and plain_host and valid_port)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """All sections. `EngineConfig.from_fields(model="/models/m", max_num_seqs=8)` takes the flat names."""

    model: ModelConfig
    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = dataclasses.field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    scaling: ScalingConfig = dataclasses.field(default_factory=ScalingConfig)
    observability: ObservabilityConfig = dataclasses.field(default_factory=ObservabilityConfig)

    def __post_init__(self) -> None:
        for name, section in SECTIONS.items():
            if not isinstance(getattr(self, name), section):
                raise ConfigError(f"must be a {section.__name__}", field=name, value=getattr(self, name))
        most, least = self.scaling.max_replicas, self.parallel.replicas
        if most is not None and most < least:
            problem = f"must be at least parallel.replicas, which is {least}, or none"
            raise ConfigError(problem, field="scaling.max_replicas", value=most)

    @property
    def most_replicas(self) -> int:
        """How many there may be at once."""
        return self.scaling.max_replicas or self.parallel.replicas

    @classmethod
    def from_fields(cls, **values: Any) -> EngineConfig:
        """From flat field names. Raises ConfigError for an unknown name, a wrong value, or a missing `model`."""
        for name in values:
            if name not in SECTION_OF:
                raise ConfigError("unknown field", field=name, value=values[name])
        if "model" not in values:
            raise ConfigError("a checkpoint directory is needed", field="model.model")
        sections = {name: _pick(section, values) for name, section in SECTIONS.items()}
        return cls(**{name: section(**sections[name]) for name, section in SECTIONS.items()})

    def fields(self) -> dict[str, Any]:
        """The flat form: field name to value, in the order of the sections."""
        return {name: getattr(getattr(self, section), name) for name, section in SECTION_OF.items()}

    def replace(self, **values: Any) -> EngineConfig:
        """A checked copy with the named fields changed."""
        return EngineConfig.from_fields(**{**self.fields(), **values})


def _pick(section: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in rules_of(section) if name in values}


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "vision": VisionConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "parallel": ParallelConfig,
    "scaling": ScalingConfig,
    "observability": ObservabilityConfig,
}
RULES: dict[str, Rule] = {name: rule for section in SECTIONS.values() for name, rule in rules_of(section).items()}
SECTION_OF: dict[str, str] = {name: key for key, section in SECTIONS.items() for name in rules_of(section)}


def resolve(config: EngineConfig) -> EngineConfig:
    """A copy in which everything is decided that can be before ranks start; reads the checkpoint's JSON files.

    Left open on purpose: on a GPU the size of the KV cache (computed from the memory found there) and the threads of a
    rank (torch's own choice), the number of blocks, and `image_input_type` (none accepts both forms).
    Raises ConfigError for what the checkpoint or this machine cannot do.
    """
    from dist_vlm.config_resolve import resolved  # it needs the sections above

    return resolved(config)
