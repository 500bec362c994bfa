#!/usr/bin/env python3
"""Build a random-weight LLaVA-1.5 checkpoint directory, fully offline.

The directory has the layout of llava-hf/llava-1.5-7b-hf and loads with
`LlavaForConditionalGeneration.from_pretrained(dir)`,
`AutoProcessor.from_pretrained(dir)` and vLLM.

    python make_llava.py --preset tiny  --out peers-run/tiny
    python make_llava.py --preset small --out peers-run/small
    python make_llava.py --preset 7b    --out peers-run/7b --config-only
    python make_llava.py --preset 70b   --out peers-run/70b --config-only

Needs: tokenizers (always); torch + safetensors (only to write weights).
Every tensor is seeded by its own name, so the values do not depend on the
order, and a float32 and a bfloat16 build hold the same numbers up to rounding.
"""

import argparse
import glob
import json
import os
import sysconfig
import zlib

# CLIP ViT-L/14 at 336 pixels.
CLIP_336 = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
PRESETS = {
    "tiny": dict(
        dtype="float32",
        text=dict(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
        ),
        vision=dict(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        ),
        max_pos=2048,
    ),
    "small": dict(
        dtype="bfloat16",
        text=dict(
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
            head_dim=64,
        ),
        vision=dict(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            image_size=224,
            patch_size=16,
        ),
        max_pos=4096,
    ),
    "7b": dict(
        dtype="bfloat16",
        text=dict(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=128,
        ),
        vision=CLIP_336,
        max_pos=4096,
    ),
    # The language model is that of Llama 2 70B; bfloat16 weights have 138 GB.
    "70b": dict(
        dtype="bfloat16",
        text=dict(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=128,
        ),
        vision=CLIP_336,
        max_pos=4096,
    ),
}
VOCAB = 32064
BASE_VOCAB = 32000
IMAGE_ID, PAD_ID = 32000, 32001

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


# ------------------------------------------------------------------ tokenizer
def corpus(limit_bytes):
    """Text found on any machine: the Python standard library's own sources."""
    root = sysconfig.get_paths()["stdlib"]
    files = sorted(glob.glob(os.path.join(root, "**", "*.py"), recursive=True))
    files = [f for f in files if "site-packages" not in f]
    total = 0
    for f in files:
        try:
            text = open(f, encoding="utf-8").read()
        except (OSError, UnicodeDecodeError):
            continue
        total += len(text)
        yield text
        if total > limit_bytes:
            return


def write_tokenizer(out, max_pos, corpus_mb):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tok = Tokenizer(models.BPE(unk_token=None, byte_fallback=False))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_VOCAB,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(corpus(int(corpus_mb * 1e6)), trainer)
    n = tok.get_vocab_size()
    if n < BASE_VOCAB:  # filler up to id 31999
        tok.add_tokens([AddedToken(f"<filler_{i}>", normalized=False) for i in range(n, BASE_VOCAB)])
    tok.add_special_tokens(
        [AddedToken("<image>", special=True, normalized=False), AddedToken("<pad>", special=True, normalized=False)]
    )
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    for want, t in ((0, "<unk>"), (1, "<s>"), (2, "</s>"), (IMAGE_ID, "<image>"), (PAD_ID, "<pad>")):
        assert tok.token_to_id(t) == want, (t, tok.token_to_id(t), want)
    tok.save(os.path.join(out, "tokenizer.json"))

    dump(
        out,
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "image_token": "<image>",
            "extra_special_tokens": {"image_token": "<image>"},
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
            "model_max_length": max_pos,
            "processor_class": "LlavaProcessor",
            "chat_template": CHAT_TEMPLATE,
        },
    )
    dump(
        out,
        "special_tokens_map.json",
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "image_token": "<image>"},
    )


# --------------------------------------------------------------------- config
def dump(out, name, obj):
    with open(os.path.join(out, name), "w") as f:
        json.dump(obj, f, indent=2)
        f.write("\n")


def write_config(out, p, dtype):
    t, v = p["text"], p["vision"]
    n_img = (v["image_size"] // v["patch_size"]) ** 2
    dump(
        out,
        "config.json",
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": IMAGE_ID,
            "image_seq_length": n_img,
            "pad_token_id": PAD_ID,
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": False,
            "torch_dtype": dtype,
            "text_config": {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                **t,
                "vocab_size": VOCAB,
                "max_position_embeddings": p["max_pos"],
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "hidden_act": "silu",
                "attention_bias": False,
                "mlp_bias": False,
                "tie_word_embeddings": False,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": PAD_ID,
                "torch_dtype": dtype,
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                **v,
                "num_channels": 3,
                "hidden_act": "quick_gelu",
                "layer_norm_eps": 1e-5,
                "projection_dim": 768,
                "vocab_size": 32000,
                "torch_dtype": dtype,
            },
        },
    )
    dump(
        out,
        "generation_config.json",
        {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD_ID, "do_sample": False},
    )
    size = v["image_size"]
    dump(
        out,
        "preprocessor_config.json",
        {
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
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )
    dump(
        out,
        "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": v["patch_size"],
            "vision_feature_select_strategy": "default",
        },
    )
    with open(os.path.join(out, "chat_template.jinja"), "w") as f:
        f.write(CHAT_TEMPLATE)
    dump(out, "chat_template.json", {"chat_template": CHAT_TEMPLATE})


# -------------------------------------------------------------------- weights
def tensor_specs(p):
    """(name, shape, kind, gain) in the naming of the hub's LLaVA-1.5 files."""
    t, v = p["text"], p["vision"]
    H, I, D = t["hidden_size"], t["intermediate_size"], t["head_dim"]
    q, kv = t["num_attention_heads"] * D, t["num_key_value_heads"] * D
    V, VI, P = v["hidden_size"], v["intermediate_size"], v["patch_size"]
    n_pos = (v["image_size"] // P) ** 2 + 1

    e = "vision_tower.vision_model."
    yield e + "embeddings.class_embedding", (V,), "normal", 1.0
    yield e + "embeddings.patch_embedding.weight", (V, 3, P, P), "fan_in", 1.0
    yield e + "embeddings.position_embedding.weight", (n_pos, V), "normal", 0.3
    for n in ("pre_layrnorm", "post_layernorm"):
        yield e + n + ".weight", (V,), "norm", 0.1
        yield e + n + ".bias", (V,), "normal", 0.05
    for i in range(v["num_hidden_layers"]):
        b = f"{e}encoder.layers.{i}."
        for n in ("layer_norm1", "layer_norm2"):
            yield b + n + ".weight", (V,), "norm", 0.1
            yield b + n + ".bias", (V,), "normal", 0.05
        for n, g in (("q_proj", 1.5), ("k_proj", 1.5), ("v_proj", 1.0), ("out_proj", 0.7)):
            yield b + f"self_attn.{n}.weight", (V, V), "fan_in", g
            yield b + f"self_attn.{n}.bias", (V,), "normal", 0.02
        yield b + "mlp.fc1.weight", (VI, V), "fan_in", 1.2
        yield b + "mlp.fc1.bias", (VI,), "normal", 0.02
        yield b + "mlp.fc2.weight", (V, VI), "fan_in", 0.7
        yield b + "mlp.fc2.bias", (V,), "normal", 0.02

    yield "multi_modal_projector.linear_1.weight", (H, V), "fan_in", 1.0
    yield "multi_modal_projector.linear_1.bias", (H,), "normal", 0.02
    yield "multi_modal_projector.linear_2.weight", (H, H), "fan_in", 1.5
    yield "multi_modal_projector.linear_2.bias", (H,), "normal", 0.02

    m = "language_model.model."
    yield m + "embed_tokens.weight", (VOCAB, H), "normal", 1.0
    for i in range(t["num_hidden_layers"]):
        b = f"{m}layers.{i}."
        yield b + "input_layernorm.weight", (H,), "norm", 0.1
        yield b + "post_attention_layernorm.weight", (H,), "norm", 0.1
        # q and k are large enough for attention to pick positions, and o and
        # down for the context to outweigh the last token's own embedding:
        # without that greedy decoding falls into a short cycle at once.
        yield b + "self_attn.q_proj.weight", (q, H), "fan_in", 1.6
        yield b + "self_attn.k_proj.weight", (kv, H), "fan_in", 1.6
        yield b + "self_attn.v_proj.weight", (kv, H), "fan_in", 1.2
        yield b + "self_attn.o_proj.weight", (H, q), "fan_in", 1.2
        yield b + "mlp.gate_proj.weight", (I, H), "fan_in", 1.2
        yield b + "mlp.up_proj.weight", (I, H), "fan_in", 1.2
        yield b + "mlp.down_proj.weight", (H, I), "fan_in", 1.0
    yield m + "norm.weight", (H,), "norm", 0.1
    yield "language_model.lm_head.weight", (VOCAB, H), "lm_head", 3.0


def make_tensor(name, shape, kind, gain, seed, dtype):
    import torch

    g = torch.Generator().manual_seed((zlib.crc32(name.encode()) ^ (seed * 0x9E3779B1)) & 0x7FFFFFFF)
    x = torch.randn(shape, generator=g, dtype=torch.float32)
    if kind == "norm":
        x = 1.0 + gain * x
    elif kind == "normal":
        x *= gain
    else:
        fan_in = 1
        for d in shape[1:]:
            fan_in *= d
        x *= gain / fan_in**0.5
    if kind == "lm_head":  # special and unused ids have logit 0, so never win
        x[:3] = 0
        x[BASE_VOCAB:] = 0
    return x.to(dtype).contiguous()


def write_weights(out, p, dtype, seed, shard_mb):
    import torch
    from safetensors.torch import save_file

    td = getattr(torch, dtype)
    cur, size, total, params = {}, 0, 0, 0
    tmp = []

    def flush():
        nonlocal cur, size
        name = f"_shard{len(tmp)}.safetensors"
        save_file(cur, os.path.join(out, name), metadata={"format": "pt"})
        tmp.append((name, list(cur)))
        cur, size = {}, 0

    for name, shape, kind, gain in tensor_specs(p):
        x = make_tensor(name, shape, kind, gain, seed, td)
        nbytes = x.numel() * x.element_size()
        if cur and size + nbytes > shard_mb * 1e6:
            flush()
        cur[name] = x
        size, total, params = size + nbytes, total + nbytes, params + x.numel()
    flush()
    if len(tmp) == 1:
        os.replace(os.path.join(out, tmp[0][0]), os.path.join(out, "model.safetensors"))
    else:
        index = {"metadata": {"total_size": total}, "weight_map": {}}
        for i, (name, keys) in enumerate(tmp):
            final = f"model-{i + 1:05d}-of-{len(tmp):05d}.safetensors"
            os.replace(os.path.join(out, name), os.path.join(out, final))
            index["weight_map"].update(dict.fromkeys(keys, final))
        dump(out, "model.safetensors.index.json", index)
    for f in glob.glob(os.path.join(out, "*.safetensors")):
        os.chmod(f, 0o644)
    return params, total


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--preset", choices=PRESETS, required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the preset's")
    ap.add_argument("--config-only", action="store_true", help="write no weights")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--shard-mb", type=float, default=4000)
    ap.add_argument("--corpus-mb", type=float, default=12, help="text to train the tokenizer on")
    ap.add_argument("--tokenizer-from", help="copy the tokenizer from a directory made before")
    a = ap.parse_args()

    p = PRESETS[a.preset]
    dtype = a.dtype or p["dtype"]
    os.makedirs(a.out, exist_ok=True)
    write_tokenizer_or_copy(a, p)
    write_config(a.out, p, dtype)
    msg = "config only"
    if not a.config_only:
        params, total = write_weights(a.out, p, dtype, a.seed, a.shard_mb)
        msg = f"{params / 1e6:.1f}M parameters, {total / 1e6:.0f} MB, {dtype}"
    n_img = (p["vision"]["image_size"] // p["vision"]["patch_size"]) ** 2
    print(f"{a.out}: preset {a.preset}, {msg}, {n_img} image tokens")


def write_tokenizer_or_copy(a, p):
    if a.tokenizer_from:
        import shutil

        for n in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(os.path.join(a.tokenizer_from, n), a.out)
    else:
        write_tokenizer(a.out, p["max_pos"], a.corpus_mb)


if __name__ == "__main__":
    main()
