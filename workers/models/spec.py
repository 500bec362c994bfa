"""Facts of a checkpoint that the driver and every rank need; read from JSON alone, without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A checkpoint's shapes and special tokens.

    family: key of the model family in `dist_vlm.workers.models`.
    path: the checkpoint directory.
    dtype: the checkpoint's own, "float32", "bfloat16" or "float16".
    image_token_id: placeholder that fills an image's positions; None for a model without images.
    image_feature_size: positions (and feature rows) of one image.
    image_input_shape: (1, channels, height, width) of the pixel tensor of one image.
    image_feature_width: width of a row of the vision tower's output, before the projector.
    image_activation_size: numbers, of the weights' type, that the vision encoder holds at once for each image of a
        batch, from its pixels to its features: an upper bound.
    is_prefix_cacheable: whether keys and values of a prefix are the same in every sequence that begins with it; not
        so where rotary frequencies depend on the sequence's length.
    eos_token_ids: tokens that end a generation.
    """

    family: str
    path: str
    dtype: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    image_token_id: int | None
    image_feature_size: int | None
    image_input_shape: tuple[int, int, int, int] | None
    image_feature_width: int | None
    image_activation_size: int | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    is_prefix_cacheable: bool


class CheckpointError(ValueError):
    """A checkpoint directory that cannot be used; the message names the file or tensor."""
