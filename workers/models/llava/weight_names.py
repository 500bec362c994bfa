"""Checkpoint names beside the modules they fill.

Three namings of the same tensors exist: the Hub's files, what transformers 5 writes, and the module tree's own. They
differ in prefixes only, so each component is looked up under every prefix it is known by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dist_vlm.workers.models.spec import CheckpointError
from dist_vlm.workers.weights import WeightSource

LANGUAGE_PREFIXES = ("language_model.model.", "model.language_model.")
HEAD_PREFIXES = ("language_model.", "")
VISION_PREFIXES = (
    "vision_tower.vision_model.",
    "model.vision_tower.vision_model.",
    "vision_tower.",
    "model.vision_tower.",
)
PROJECTOR_PREFIXES = ("multi_modal_projector.", "model.multi_modal_projector.")

# A decoder layer's modules -> the checkpoint's matrices fused in each.
LAYER_TABLE: Mapping[str, Sequence[str]] = {
    "input_norm": ("input_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_out": ("self_attn.o_proj",),
    "post_attention_norm": ("post_attention_layernorm",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def find_prefix(source: WeightSource, prefixes: Sequence[str], probe: str) -> str:
    """The first prefix under which the checkpoint has the tensor `probe`; `CheckpointError` naming all tried."""
    for prefix in prefixes:
        if source.has(prefix + probe):
            return prefix
    raise CheckpointError(f"the checkpoint has no tensor {' or '.join(prefix + probe for prefix in prefixes)}")


def language_table(num_layers: int, *, prefix: str, head: str | None) -> dict[str, tuple[str, ...]]:
    """Module path -> checkpoint names. head: name of the output matrix; None where it is tied to the embedding."""
    table: dict[str, tuple[str, ...]] = {"embedding": (f"{prefix}embed_tokens",), "norm": (f"{prefix}norm",)}
    if head is not None:
        table["head"] = (head,)
    for index in range(num_layers):
        for path, names in LAYER_TABLE.items():
            table[f"layers.{index}.{path}"] = tuple(f"{prefix}layers.{index}.{name}" for name in names)
    return table


def vision_names(name: str) -> tuple[str, ...]:
    """Checkpoint names, without prefix, of the tensors fused in the parameter `name` of the tower or the projector."""
    before, fused, kind = name.partition("self_attn.qkv.")
    return tuple(f"{before}self_attn.{one}_proj.{kind}" for one in "qkv") if fused else (name,)


def is_buffer(name: str) -> bool:
    """Whether a tensor is a table that old checkpoints carry and the model computes itself."""
    return name.endswith((".rotary_emb.inv_freq", ".embeddings.position_ids"))


def vision_ignored(name: str, num_layers: int) -> bool:
    """Whether a tower's tensor, without prefix, is known but not needed to compute `num_layers` of its layers."""
    if is_buffer(f".{name}") or name.startswith("post_layernorm."):
        return True
    parts = name.split(".")
    return parts[:2] == ["encoder", "layers"] and parts[2].isdigit() and int(parts[2]) >= num_layers
