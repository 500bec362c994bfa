from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import dist_vlm.config_resolve
from dist_vlm.config import ConfigError, EngineConfig, resolve
from dist_vlm.config_resolve import resolved_parallel, resolved_without_checkpoint


@pytest.fixture(autouse=True)
def two_cores_and_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist_vlm.config_resolve, "usable_cores", lambda: 8)
    monkeypatch.setattr(dist_vlm.config_resolve, "nvidia_gpu_seen", lambda: False)


def config_for(folder: Path, **values: Any) -> EngineConfig:
    return EngineConfig.from_fields(model=str(folder), **values)


def test_every_auto_is_decided_from_the_checkpoint(tiny_facts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist_vlm.config_resolve, "find_compiler", lambda: "/usr/bin/g++")
    before = config_for(tiny_facts, tensor_parallel_size=2)
    after = resolve(before)
    assert after.model.dtype == "float32"
    assert after.model.load_format == "safetensors"
    assert after.model.max_model_len == 2048
    assert after.model.tokenizer == after.vision.image_processor == str(tiny_facts)
    assert (after.vision.image_token_id, after.vision.image_feature_size) == (32000, 16)
    assert after.vision.image_input_shape == (1, 3, 56, 56)
    assert (after.parallel.device, after.parallel.threads_per_rank, after.parallel.kernels) == ("cpu", 4, "cpp")
    assert after.cache.kv_cache_memory_gib == 1.0
    assert "auto" not in after.fields().values()
    assert before == config_for(tiny_facts, tensor_parallel_size=2)
    assert resolve(after) == after


def test_without_a_compiler_the_ops_run_in_torch_and_the_log_says_so(
    tiny_facts: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dist_vlm.config_resolve, "find_compiler", lambda: None)
    assert resolve(config_for(tiny_facts)).parallel.kernels == "torch"
    assert "no C++ compiler is found" in caplog.text


def test_compiled_kernels_are_refused_on_a_gpu(tiny_facts: Path) -> None:
    with pytest.raises(ValueError, match="must be auto, reference, torch or triton on a GPU"):
        resolve(config_for(tiny_facts, device="cuda", kernels="cpp"))


def test_a_gpu_runs_triton_where_it_is_installed(
    tiny_facts: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_for(tiny_facts, device="cuda")
    monkeypatch.setattr(dist_vlm.config_resolve, "triton_found", lambda: True)
    assert resolve(config).parallel.kernels == "triton"
    assert "triton" not in caplog.text
    monkeypatch.setattr(dist_vlm.config_resolve, "triton_found", lambda: False)
    assert resolve(config).parallel.kernels == "torch"
    assert "triton cannot be imported" in caplog.text


@pytest.mark.parametrize(
    ("device", "found", "interpreted", "message"),
    [
        ("cuda", False, False, "must be auto, reference, torch or cpp: triton cannot be imported here"),
        ("cpu", False, True, "must be auto, reference, torch or cpp: triton cannot be imported here"),
        ("cpu", True, False, "must be auto, reference, torch or cpp on a CPU, unless TRITON_INTERPRET=1 is set"),
        ("cpu", True, True, None),
        ("cuda", True, False, None),
    ],
)
def test_triton_is_refused_where_it_cannot_run(
    tiny_facts: Path, monkeypatch: pytest.MonkeyPatch, device: str, found: bool, interpreted: bool, message: str | None
) -> None:
    monkeypatch.setattr(dist_vlm.config_resolve, "triton_found", lambda: found)
    monkeypatch.setattr(dist_vlm.config_resolve, "triton_interpreted", lambda: interpreted)
    config = config_for(tiny_facts, device=device, kernels="triton")
    if message is None:
        assert resolve(config).parallel.kernels == "triton"
    else:
        with pytest.raises(ConfigError, match=f"parallel.kernels = 'triton': {message}"):
            resolve(config)


def test_what_is_given_stays(tiny_facts: Path) -> None:
    given = {
        "dtype": "bfloat16",
        "load_format": "dummy",
        "max_model_len": 100,
        "image_input_type": "image_features",
        "image_token_id": 32000,
        "image_input_shape": (1, 3, 56, 56),
        "image_feature_size": 16,
        "kv_cache_memory_gib": 0.5,
        "num_gpu_blocks_override": 7,
        "threads_per_rank": 3,
        "device": "cuda",
        "kernels": "reference",
    }
    after = resolve(config_for(tiny_facts, **given)).fields()
    assert {name: after[name] for name in given} == given


def test_the_type_of_an_unsized_checkpoint_is_kept_on_a_cpu(facts_7b: Path) -> None:
    assert resolve(config_for(facts_7b, device="cpu")).model.dtype == "bfloat16"


def test_a_gpu_decides_the_size_of_its_cache(facts_7b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist_vlm.config_resolve, "nvidia_gpu_seen", lambda: True)
    after = resolve(config_for(facts_7b))
    assert after.parallel.device == "cuda"
    assert (after.cache.kv_cache_memory_gib, after.parallel.threads_per_rank) == (None, None)


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({"tensor_parallel_size": 1}, 8),
        ({"tensor_parallel_size": 4}, 2),
        ({"tensor_parallel_size": 16}, 1),
        ({"tensor_parallel_size": 2, "replicas": 2}, 2),
        ({"tensor_parallel_size": 2, "replicas": 2, "num_nodes": 2}, 4),
        ({"tensor_parallel_size": 1, "replicas": 3, "num_nodes": 2}, 4),
    ],
)
def test_the_ranks_of_a_node_share_its_cores(given: dict[str, int], threads: int) -> None:
    parallel = EngineConfig.from_fields(model="m", **given).parallel
    assert resolved_parallel(parallel).threads_per_rank == threads


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ({}, 2048),
        ({"tensor_parallel_size": 2}, 2048),  # of the machine's cores
        ({"tensor_parallel_size": 2, "device": "cuda", "kernels": "torch"}, 4096),
        ({"tensor_parallel_size": 2, "device": "cuda", "kernels": "torch", "replicas": 2}, 4096),
        ({"tensor_parallel_size": 2, "device": "cuda", "kernels": "torch", "share_gpu": True}, 2048),
        ({"tensor_parallel_size": 2, "device": "cuda", "kernels": "torch", "max_num_seqs": 5000}, 5000),
        ({"tensor_parallel_size": 2, "max_num_batched_tokens": 100}, 100),
    ],
)
def test_a_step_has_so_many_tokens_for_each_gpu_that_shares_it(
    tiny_facts: Path, given: dict[str, Any], tokens: int
) -> None:
    config = resolve(EngineConfig.from_fields(model=str(tiny_facts), **({"device": "cpu"} | given)))
    assert config.scheduler.max_num_batched_tokens == tokens


def test_one_process_without_a_gpu_cannot_use_cuda(tiny_facts: Path) -> None:
    with pytest.raises(ConfigError, match="parallel.device = 'cuda': must be auto or cpu: no NVIDIA GPU is seen here"):
        resolve(config_for(tiny_facts, device="cuda", executor="inline"))
    assert resolve(config_for(tiny_facts, device="cuda", executor="ray")).parallel.device == "cuda"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"tensor_parallel_size": 3},
            "parallel.tensor_parallel_size = 3: the checkpoint's 4 attention heads do not divide into 3 equal parts; "
            "must be one of 1, 2, 4",
        ),
        ({"tensor_parallel_size": 8}, "must be one of 1, 2, 4"),
        (
            {"max_model_len": 2049},
            "model.max_model_len = 2049: must be an integer from 1 to 2048, the checkpoint's limit, or none",
        ),
        (
            {"num_gpu_blocks_override": 127},
            "cache.num_gpu_blocks_override = 127: must be at least 128: "
            "a sequence of max_model_len 2048 needs as many blocks",
        ),
        (
            {"num_gpu_blocks_override": 3, "max_model_len": 25, "block_size": 8},
            "cache.num_gpu_blocks_override = 3: must be at least 4: a sequence of max_model_len 25 needs",
        ),
        ({"image_token_id": 5}, "vision.image_token_id = 5: must be 32000, the checkpoint's, or none"),
        ({"image_feature_size": 576}, "vision.image_feature_size = 576: must be 16, the checkpoint's, or none"),
        (
            {"image_input_shape": "1,3,336,336"},
            "vision.image_input_shape = (1, 3, 336, 336): must be (1, 3, 56, 56), the checkpoint's, or none",
        ),
        ({"tokenizer": "/absent/t"}, "model.tokenizer = '/absent/t': must be an existing directory"),
        ({"image_processor": "/absent/p"}, "vision.image_processor = '/absent/p': must be an existing directory"),
    ],
)
def test_the_impossible_is_named_with_what_is_allowed(tiny_facts: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(config_for(tiny_facts, **given))
    assert message in str(caught.value)


def test_the_smallest_cache_for_one_sequence_is_enough(tiny_facts: Path) -> None:
    assert resolve(config_for(tiny_facts, num_gpu_blocks_override=128)).cache.num_gpu_blocks_override == 128


@pytest.mark.parametrize(
    ("text_config", "size", "fits"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 2}, 8, True),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, 3, False),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, 2, False),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, 6, True),
        ({"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 100}, 8, False),
        ({"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 100}, 4, True),
    ],
)
def test_shards_must_be_equal(
    tiny_facts: Path, tmp_path: Path, text_config: dict[str, int], size: int, fits: bool
) -> None:
    folder = shutil.copytree(tiny_facts, tmp_path / "m")
    facts = json.loads((folder / "config.json").read_text())
    facts["text_config"].update({"hidden_size": 96, "head_dim": 16, "intermediate_size": 96, **text_config})
    (folder / "config.json").write_text(json.dumps(facts))
    config = config_for(folder, tensor_parallel_size=size)
    if fits:
        assert resolve(config).parallel.tensor_parallel_size == size
    else:
        with pytest.raises(ConfigError, match="must be one of 1"):
            resolve(config)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.model = '/absent/m': .*/absent/m.* is not a directory"):
        resolve(EngineConfig.from_fields(model="/absent/m"))
    with pytest.raises(ConfigError, match=r"model.model = .*config.json is missing"):
        resolve(config_for(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"model.model = .*config.json is not JSON"):
        resolve(config_for(tmp_path))


def test_a_relative_checkpoint_becomes_absolute(tiny_facts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_facts.parent)
    after = resolve(EngineConfig.from_fields(model=tiny_facts.name, tokenizer=f"./{tiny_facts.name}"))
    assert after.model.model == after.model.tokenizer == str(tiny_facts)


def test_a_processor_that_is_not_wanted_is_not_named(tiny_facts: Path) -> None:
    assert resolve(config_for(tiny_facts, disable_image_processor=True)).vision.image_processor is None


def test_without_a_checkpoint_the_machine_alone_decides() -> None:
    before = EngineConfig.from_fields(model="/absent/m", tensor_parallel_size=2)
    after = resolved_without_checkpoint(before)
    assert after.model == before.model
    assert after.vision == before.vision
    assert (after.parallel.device, after.parallel.threads_per_rank) == ("cpu", 4)
