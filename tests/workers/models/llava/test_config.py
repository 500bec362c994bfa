"""Facts from JSON: against transformers' own reading, and what a wrong field says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dist_vlm.workers.models import CheckpointError, read_spec
from dist_vlm.workers.models.llava.config import read_facts, transformers_config

# config.json of llava-hf/llava-1.5-7b-hf, by its fields: most of the language model's are left out.
HUB_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}


def write(path, config, **files):
    (path / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return str(path)


def changed(section, **fields):
    config = json.loads(json.dumps(HUB_7B))
    (config[section] if section else config).update(fields)
    return config


def test_the_hub_checkpoint_of_7b(tmp_path) -> None:
    spec = read_spec(write(tmp_path, HUB_7B))
    assert (spec.vocab_size, spec.hidden_size, spec.intermediate_size) == (32064, 4096, 11008)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (32, 32, 32, 128)
    assert (spec.max_position_embeddings, spec.dtype, spec.family) == (4096, "float16", "llava")
    assert (spec.image_token_id, spec.image_feature_size, spec.image_feature_width) == (32000, 576, 1024)
    assert spec.image_input_shape == (1, 3, 336, 336)
    # Pixels, the selected rows, and the MLP of 577 rows: one of its outer and 3 of its inner width.
    assert spec.image_activation_size == 3 * 336**2 + 576 * 1024 + 577 * (1024 + 3 * 4096)
    assert spec.is_prefix_cacheable
    assert (spec.bos_token_id, spec.eos_token_ids, spec.pad_token_id) == (1, (2,), 32001)


CONFIGS = {
    "hub": HUB_7B,
    "nothing": {"model_type": "llava", "text_config": {"vocab_size": 32064}},
    "vision defaults": {"model_type": "llava", "vision_config": {"hidden_size": 384}, "image_token_index": 5},
    "gqa": changed("text_config", num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
    "nulls": changed("text_config", num_key_value_heads=None, head_dim=None, rope_scaling=None),
    "tied at the top": changed(None, tie_word_embeddings=True),
    "new spelling": {**{k: v for k, v in HUB_7B.items() if k != "image_token_index"}, "image_token_id": 7},
    "biases": changed("text_config", attention_bias=True, mlp_bias=True),
    "tower": changed("vision_config", layer_norm_eps=1e-4, hidden_act="gelu", num_attention_heads=8, num_channels=1),
    "projector": changed(None, projector_hidden_act="relu", multimodal_projector_bias=False),
    "theta": changed("text_config", rope_theta=5e5),
    "theta of rope_parameters": changed("text_config", rope_theta=5e5, rope_parameters={"rope_theta": 7000}),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_facts_are_those_that_transformers_reads(tmp_path, config) -> None:
    path = write(tmp_path, config)
    facts, own = read_facts(path), transformers_config(path)
    text, vision = own.text_config, own.vision_config
    assert facts.image_token_id == own.image_token_id
    for ours, theirs in (
        ("vocab_size", "vocab_size"),
        ("hidden_size", "hidden_size"),
        ("intermediate_size", "intermediate_size"),
        ("num_layers", "num_hidden_layers"),
        ("num_heads", "num_attention_heads"),
        ("num_kv_heads", "num_key_value_heads"),
        ("head_dim", "head_dim"),
        ("max_position_embeddings", "max_position_embeddings"),
        ("rms_norm_eps", "rms_norm_eps"),
        ("attention_bias", "attention_bias"),
        ("mlp_bias", "mlp_bias"),
    ):
        assert getattr(facts.text, ours) == getattr(text, theirs), ours
    assert facts.text.tied_head == own.tie_word_embeddings
    assert facts.text.rope_parameters == {name: text.rope_parameters[name] for name in ("rope_type", "rope_theta")}
    assert facts.vision.hidden_size == vision.hidden_size
    assert facts.vision.intermediate_size == vision.intermediate_size
    assert facts.vision.num_layers == vision.num_hidden_layers
    assert (facts.vision.image_size, facts.vision.patch_size) == (vision.image_size, vision.patch_size)
    assert facts.vision.num_channels == vision.num_channels
    assert facts.vision.num_heads == vision.num_attention_heads
    assert (facts.vision.hidden_act, facts.vision.layer_norm_eps) == (vision.hidden_act, vision.layer_norm_eps)
    assert facts.vision.projector_hidden_act == own.projector_hidden_act
    assert facts.vision.projector_bias == own.multimodal_projector_bias


LONGROPE = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "factor": 2.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 2048}
ROPES = {
    "older name": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear", True),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic", False),
    "both types": ({"rope_scaling": {"rope_type": "dynamic", "type": "linear", "factor": 2.0}}, "dynamic", False),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "yarn", True),
    "llama3": ({"rope_parameters": {"rope_type": "llama3", **LLAMA3, "rope_theta": 1e4}}, "llama3", True),
    "longrope": ({"rope_parameters": {"rope_type": "longrope", **LONGROPE, "rope_theta": 1e4}}, "longrope", False),
    "theta alone": ({"rope_parameters": {"rope_theta": 5e5}}, "default", True),
    "both": (
        {
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        },
        "dynamic",
        False,
    ),
    "theta beside the older name": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 7e4},
        "linear",
        True,
    ),
    "an empty older one": (
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "dynamic",
        False,
    ),
}


@pytest.mark.parametrize(("fields", "rope_type", "is_prefix_cacheable"), ROPES.values(), ids=ROPES.keys())
def test_frequencies_of_the_sequences_length_forbid_a_prefix_cache(
    tmp_path, fields, rope_type, is_prefix_cacheable
) -> None:
    path = write(tmp_path, changed("text_config", **fields))
    facts, own = read_facts(path).text, transformers_config(path).text_config.rope_parameters
    assert facts.rope_type == own["rope_type"] == rope_type
    assert facts.rope_theta == own["rope_theta"]
    assert read_spec(path).is_prefix_cacheable == is_prefix_cacheable


@pytest.mark.parametrize(
    ("layers", "expected", "needed"),
    [(-2, (23,), 23), (-1, (24,), 24), (0, (0,), 0), (5, (5,), 5), ([-2, 3, 8], (23, 3, 8), 23), (-25, (0,), 0)],
)
def test_feature_layers_count_from_either_end(tmp_path, layers, expected, needed) -> None:
    vision = read_facts(write(tmp_path, changed(None, vision_feature_layer=layers))).vision
    assert vision.feature_layers == expected
    assert vision.num_needed_layers == needed
    assert vision.width == 1024 * len(expected)


def test_the_full_strategy_keeps_the_class_row(tmp_path) -> None:
    assert read_spec(write(tmp_path, changed(None, vision_feature_select_strategy="full"))).image_feature_size == 577


def test_special_tokens_come_from_the_generation_config_first(tmp_path) -> None:
    generation = {"eos_token_id": [2, 32007], "bos_token_id": 4}
    spec = read_spec(write(tmp_path, changed("text_config", eos_token_id=9), generation_config=generation))
    assert (spec.eos_token_ids, spec.bos_token_id, spec.pad_token_id) == ((2, 32007), 4, 32001)
    (tmp_path / "generation_config.json").unlink()
    assert read_spec(str(tmp_path)).eos_token_ids == (9,)


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("text_config", {"model_type": "mistral"}, "text_config.model_type is 'mistral', must be llama"),
        ("text_config", {"model_type": "qwen2"}, "text_config.model_type is 'qwen2', must be llama"),
        ("text_config", {"hidden_act": "gelu"}, "text_config.hidden_act is 'gelu', must be silu"),
        ("text_config", {"hidden_size": "big"}, "text_config.hidden_size is 'big', must be an integer of at least 1"),
        ("text_config", {"num_hidden_layers": 0}, "text_config.num_hidden_layers is 0, must be an integer"),
        ("text_config", {"num_hidden_layers": True}, "num_hidden_layers is True, must be an integer"),
        ("text_config", {"num_key_value_heads": 5}, "num_key_value_heads is 5, must be a divisor of"),
        ("text_config", {"hidden_size": 4097}, "hidden_size is 4097, must be a multiple of num_attention_heads 32"),
        ("text_config", {"hidden_size": 4097, "head_dim": 128}, "hidden_size is 4097, must be a multiple of"),
        ("text_config", {"head_dim": 33}, "text_config.head_dim is 33, must be even"),
        ("text_config", {"rms_norm_eps": -1}, "text_config.rms_norm_eps is -1, must be a number above 0"),
        ("text_config", {"rope_scaling": {"type": 3}}, "text_config.rope_scaling.type is 3, must be a string"),
        ("text_config", {"rope_scaling": "linear"}, "text_config.rope_scaling is 'linear', must be an object"),
        ("text_config", {"rope_theta": "10k"}, "text_config.rope_theta is '10k', must be a number above 0"),
        (
            "text_config",
            {"rope_parameters": {"rope_theta": 0}},
            "rope_parameters.rope_theta is 0, must be a number above",
        ),
        ("text_config", {"attention_bias": "no"}, "text_config.attention_bias is 'no', must be true or false"),
        ("text_config", {"vocab_size": 32000}, "image_token_index is 32000, must be below text_config.vocab_size"),
        ("vision_config", {"model_type": "siglip_vision_model"}, "vision_config.model_type is 'siglip_vision_model'"),
        ("vision_config", {"image_size": [336, 336]}, r"vision_config.image_size is \[336, 336\], must be an integer"),
        ("vision_config", {"patch_size": 400}, "vision_config.patch_size is 400, must be at most image_size 336"),
        (
            "vision_config",
            {"num_attention_heads": 7},
            "num_attention_heads is 7, must be a divisor of hidden_size 1024",
        ),
        ("vision_config", {"num_attention_heads": 1.0}, "vision_config.num_attention_heads is 1.0, must be an integer"),
        ("vision_config", {"hidden_act": "prelu"}, "vision_config.hidden_act is 'prelu', must be gelu or gelu_10 or"),
        ("vision_config", {"layer_norm_eps": "1e-5"}, "vision_config.layer_norm_eps is '1e-5', must be a number above"),
        (None, {"projector_hidden_act": "swiglu"}, "projector_hidden_act is 'swiglu', must be gelu or gelu_10 or"),
        (None, {"multimodal_projector_bias": 1}, "multimodal_projector_bias is 1, must be true or false"),
        (None, {"vision_feature_layer": -26}, r"vision_feature_layer is -26, must be in \[-25, 25\)"),
        (None, {"vision_feature_layer": "last"}, "vision_feature_layer is 'last', must be an integer or a list"),
        (None, {"vision_feature_select_strategy": "cls"}, "select_strategy is 'cls', must be default or full"),
        (None, {"torch_dtype": "int8"}, "torch_dtype is 'int8', must be float32 or bfloat16 or float16"),
        (None, {"quantization_config": {"bits": 4}}, "quantization_config is .*, must be absent"),
        (None, {"text_config": [1]}, r"text_config is \[1\], must be an object"),
        (None, {"eos_token_id": "</s>"}, "eos_token_id is '</s>', must be an integer or a list of integers"),
    ],
)
def test_a_wrong_field_is_named_with_file_value_and_what_is_allowed(tmp_path, section, fields, message) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        read_spec(write(tmp_path, changed(section, **fields)))


def test_what_transformers_refuses_is_told_with_its_reason(tmp_path) -> None:
    path = write(tmp_path, changed("text_config", rope_scaling={"type": "linear"}))
    with pytest.raises(CheckpointError, match=r"(?s)config.json: transformers refuses it: .*factor"):
        transformers_config(path)


def test_reading_a_spec_imports_neither_torch_nor_transformers(tmp_path) -> None:
    code = (
        "import sys; from dist_vlm.workers.models import read_spec; read_spec(sys.argv[1]);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", code, write(tmp_path, HUB_7B)], check=True, timeout=60)
