"""The demo checkpoint's directory: sizes of the model, the JSON files around the weights, and the weights' names.

The layout is the one published LLaVA-1.5 checkpoints have, so whatever reads those reads this one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, LlavaForConditionalGeneration

from examples.demo.tokenizer import BOS, EOS, IMAGE, PAD, UNK, save_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] in ('image', 'image_url') %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'text' %}{{ content['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
# transformers' module names, and the names published checkpoints carry
STORED_PREFIX = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


@dataclass(frozen=True)
class TextSizes:
    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 5
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32


@dataclass(frozen=True)
class VisionSizes:
    """The last layer is stored and never used: the projector reads the one before it."""

    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 5
    num_attention_heads: int = 6
    image_size: int = 72
    patch_size: int = 8


@dataclass(frozen=True)
class Sizes:
    text: TextSizes = field(default_factory=TextSizes)
    vision: VisionSizes = field(default_factory=VisionSizes)
    max_position_embeddings: int = 2048

    @property
    def num_image_tokens(self) -> int:
        return (self.vision.image_size // self.vision.patch_size) ** 2


def write_files(folder: Path, tokenizer: Tokenizer, sizes: Sizes) -> None:
    """Every file of the checkpoint but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    vocabulary = tokenizer.get_vocab()
    ids = {text: vocabulary[text] for text in (BOS, EOS, IMAGE, PAD)}
    vocab = -(-len(vocabulary) // 64) * 64  # rows past the last token are never a target
    _dump(folder / "config.json", _model_config(sizes, ids, vocab))
    _dump(folder / "tokenizer_config.json", _tokenizer_config(sizes))
    _dump(folder / "special_tokens_map.json", _special_tokens())
    _dump(
        folder / "generation_config.json",
        {
            "bos_token_id": ids[BOS],
            "eos_token_id": ids[EOS],
            "pad_token_id": ids[PAD],
            "do_sample": False,
        },
    )
    _dump(folder / "preprocessor_config.json", _preprocessor_config(sizes.vision.image_size))
    _dump(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE,
            "num_additional_image_tokens": 1,
            "patch_size": sizes.vision.patch_size,
            "vision_feature_select_strategy": "default",
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def new_model(folder: Path, seed: int) -> LlavaForConditionalGeneration:
    """A freshly initialised float32 model of the sizes in the folder's config.json."""
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(AutoConfig.from_pretrained(folder)).float()


def save_weights(model: LlavaForConditionalGeneration, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """model.safetensors under the published names, rounded to `dtype`."""
    tensors = {
        _stored_name(name): tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def _stored_name(name: str) -> str:
    for ours, stored in STORED_PREFIX.items():
        if name.startswith(ours):
            rest = name.removeprefix(ours)
            return stored + rest.removeprefix("vision_model.")
    raise ValueError(f"weight {name!r} is under none of the known prefixes {sorted(STORED_PREFIX)}")


def _model_config(sizes: Sizes, ids: dict[str, int], vocab: int) -> dict[str, Any]:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": ids[IMAGE],
        "image_seq_length": sizes.num_image_tokens,
        "pad_token_id": ids[PAD],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(sizes.text),
            "vocab_size": vocab,
            "max_position_embeddings": sizes.max_position_embeddings,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": ids[BOS],
            "eos_token_id": ids[EOS],
            "pad_token_id": ids[PAD],
            "torch_dtype": "float32",
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            **asdict(sizes.vision),
            "num_channels": 3,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": sizes.text.hidden_size,
            "torch_dtype": "float32",
        },
    }


def _tokenizer_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        **_special_tokens(),
        "extra_special_tokens": {"image_token": IMAGE},
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": sizes.max_position_embeddings,
        "processor_class": "LlavaProcessor",
        "chat_template": CHAT_TEMPLATE,
    }


def _special_tokens() -> dict[str, str]:
    return {"bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "pad_token": PAD, "image_token": IMAGE}


def _preprocessor_config(size: int) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }


def _dump(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
