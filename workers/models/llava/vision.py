"""The CLIP tower and projector of a LLaVA checkpoint: transformers' own modules, whole on every rank.

Only the encoder layers that the selected hidden states need are built.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.activations import QuickGELUActivation
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from dist_vlm.kernels.choice import OpSet
from dist_vlm.workers.models.family import VisionModel
from dist_vlm.workers.models.llava.config import VisionFacts

if TYPE_CHECKING:
    from transformers import LlavaConfig


def register_attention(ops: OpSet) -> str:
    """Makes the rank's op known to transformers' modules; returns the name to configure them with."""

    def attend(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        if mask is not None:
            raise ValueError(f"{type(module).__name__} asks for masked attention: every token sees every other here")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # heads come first
        return ops.full_attention(q, k, v, scale=scaling), None

    name = f"dist_vlm_{ops.full_attention.__name__}"
    AttentionInterface.register(name, attend)
    return name


class Tower(nn.Module):
    """CLIP tower and projector under the names the checkpoint's tables use."""

    def __init__(self, facts: VisionFacts, config: LlavaConfig, ops: OpSet) -> None:
        super().__init__()
        clip_config: Any = copy.deepcopy(config.vision_config)
        clip_config.num_hidden_layers = facts.num_needed_layers
        clip_config._attn_implementation = register_attention(ops)
        clip: Any = CLIPVisionModel(clip_config)
        clip.post_layernorm = nn.Identity()  # feeds the pooled output alone, which nobody reads
        self.clip = clip
        self.projector = LlavaMultiModalProjector(config)


class QuickGelu(nn.Module):
    """The tower's activation, by the op that the rank chose."""

    def __init__(self, ops: OpSet) -> None:
        super().__init__()
        self._op = ops.quick_gelu

    def forward(self, x: Tensor) -> Tensor:
        return self._op(x)


class ClipVisionModel(VisionModel):
    """See `VisionModel`."""

    def __init__(
        self, facts: VisionFacts, config: LlavaConfig, *, ops: OpSet, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.facts = facts
        with torch.device("meta"):  # no time or memory for weights that are read afterwards
            tower = Tower(facts, config, ops)
        for name, module in list(tower.named_modules()):
            if isinstance(module, QuickGELUActivation):
                tower.set_submodule(name, QuickGelu(ops))
        self.module = self.tower = tower.to(dtype).to_empty(device=device).eval().requires_grad_(False)
        embeddings = tower.clip.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions, device=device).unsqueeze(0)
        if buffers := {name for name, _ in tower.named_buffers()} - {"clip.embeddings.position_ids"}:
            raise RuntimeError(f"the vision tower has buffers that nothing fills: {', '.join(sorted(buffers))}")

    def encode_pixels(self, pixel_values: Tensor) -> Tensor:
        states = self.tower.clip(pixel_values, output_hidden_states=True).hidden_states
        first = 0 if self.facts.keeps_class_row else 1
        selected = torch.cat([states[layer][:, first:] for layer in self.facts.feature_layers], dim=-1)
        return self.project_features(selected)

    def project_features(self, features: Tensor) -> Tensor:
        projected: Tensor = self.tower.projector(features)
        return projected
