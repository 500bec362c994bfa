"""The vision encoder of CLIP, as far as a LLaVA checkpoint reads it.

Parameters have the checkpoint's names, but for `qkv`, where three of its matrices are fused. Radford et al., "Learning
Transferable Visual Models From Natural Language Supervision", 2021.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from dist_vlm.kernels.checks import check_shape
from dist_vlm.kernels.choice import OpSet
from dist_vlm.workers.models.llava.activations import activation
from dist_vlm.workers.models.llava.config import VisionFacts


class Embeddings(nn.Module):
    """Pixels [N, channels, size, size] -> rows [N, 1 + patches, hidden_size]: the class embedding, then the patches,
    each with the embedding of its position. Edges that no whole patch covers are left out."""

    def __init__(self, facts: VisionFacts) -> None:
        super().__init__()
        self._pixels = (None, facts.num_channels, facts.image_size, facts.image_size)
        width, patch = facts.hidden_size, facts.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(facts.num_channels, width, kernel_size=patch, stride=patch, bias=False)
        # Not drawn at random, for which torch would import its compiler.
        self.position_embedding = nn.Embedding.from_pretrained(torch.empty(facts.num_tower_rows, width))

    def forward(self, pixels: Tensor) -> Tensor:
        check_shape("the vision tower", "pixel_values", pixels, self._pixels)
        patches = self.patch_embedding(pixels.to(self.class_embedding.dtype)).flatten(2).transpose(1, 2)
        rows = torch.cat([self.class_embedding.expand(pixels.shape[0], 1, -1), patches], dim=1)
        rows += self.position_embedding.weight
        return rows


class Attention(nn.Module):
    """Every row sees every other. [N, T, hidden_size] -> the same. norm: of the input; applied here, so that
    its result does not outlive the first product."""

    def __init__(self, facts: VisionFacts, ops: OpSet) -> None:
        super().__init__()
        self.qkv = nn.Linear(facts.hidden_size, 3 * facts.hidden_size)
        self.out_proj = nn.Linear(facts.hidden_size, facts.hidden_size)
        self._heads = (3, facts.num_heads, facts.hidden_size // facts.num_heads)
        self._scale = self._heads[-1] ** -0.5
        self._attend = ops.full_attention

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        q, k, v = self.qkv(norm(x)).unflatten(-1, self._heads).unbind(2)
        attended: Tensor = self.out_proj(self._attend(q, k, v, scale=self._scale).flatten(2))
        return attended


class Mlp(nn.Module):
    """[N, T, hidden_size] -> the same. norm: as in `Attention`."""

    def __init__(self, facts: VisionFacts, ops: OpSet) -> None:
        super().__init__()
        self.fc1 = nn.Linear(facts.hidden_size, facts.intermediate_size)
        self.fc2 = nn.Linear(facts.intermediate_size, facts.hidden_size)
        self._act = activation(facts.hidden_act, ops)

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        out: Tensor = self.fc2(self._act(self.fc1(norm(x))))
        return out


class EncoderLayer(nn.Module):
    """One layer. x: [N, T, hidden_size], which becomes the result."""

    def __init__(self, facts: VisionFacts, ops: OpSet) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(facts.hidden_size, eps=facts.layer_norm_eps)
        self.self_attn = Attention(facts, ops)
        self.layer_norm2 = nn.LayerNorm(facts.hidden_size, eps=facts.layer_norm_eps)
        self.mlp = Mlp(facts, ops)

    def forward(self, x: Tensor) -> Tensor:
        x += self.self_attn(x, self.layer_norm1)
        x += self.mlp(x, self.layer_norm2)
        return x


class Encoder(nn.Module):
    def __init__(self, facts: VisionFacts, ops: OpSet) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(facts, ops) for _ in range(facts.num_needed_layers))


class ClipTower(nn.Module):
    """The layers that the selected hidden states need; nothing after them."""

    def __init__(self, facts: VisionFacts, ops: OpSet) -> None:
        super().__init__()
        self.embeddings = Embeddings(facts)
        self.pre_layrnorm = nn.LayerNorm(facts.hidden_size, eps=facts.layer_norm_eps)  # so the checkpoints spell it
        self.encoder = Encoder(facts, ops)

    def hidden_states(self, pixels: Tensor) -> Iterator[Tensor]:
        """[N, T, hidden_size], the input of the first layer and then each layer's output. One tensor holds them all:
        whoever needs one copies it before asking for the next."""
        x: Tensor = self.pre_layrnorm(self.embeddings(pixels))
        yield x
        for layer in cast("Iterable[EncoderLayer]", self.encoder.layers):
            yield layer(x)
