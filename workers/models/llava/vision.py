"""The CLIP tower and projector of a LLaVA checkpoint, whole on every rank."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_vlm.kernels.choice import OpSet
from dist_vlm.workers.models.family import VisionModel
from dist_vlm.workers.models.llava.activations import activation
from dist_vlm.workers.models.llava.clip import ClipTower
from dist_vlm.workers.models.llava.config import VisionFacts


class Projector(nn.Module):
    """Selected rows of the tower [..., width] -> rows of the language model [..., hidden_size]."""

    def __init__(self, facts: VisionFacts, hidden_size: int, ops: OpSet) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(facts.width, hidden_size, bias=facts.projector_bias)
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=facts.projector_bias)
        self._act = activation(facts.projector_hidden_act, ops)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(self._act(self.linear_1(x)))
        return out


class Vision(nn.Module):
    """Both, under the names that `load_vision` knows them by."""

    def __init__(self, facts: VisionFacts, hidden_size: int, ops: OpSet) -> None:
        super().__init__()
        self.clip = ClipTower(facts, ops)
        self.projector = Projector(facts, hidden_size, ops)


class ClipVisionModel(VisionModel):
    """See `VisionModel`. hidden_size: the language model's."""

    def __init__(
        self, facts: VisionFacts, hidden_size: int, *, ops: OpSet, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.facts = facts
        self._dtype = dtype
        with torch.device("meta"):  # no time or memory for weights that are read afterwards
            self.module = self.vision = Vision(facts, hidden_size, ops).eval()
        # Not `to_empty`, which imports sympy.
        for module in self.vision.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                setattr(module, name, nn.Parameter(empty, requires_grad=False))

    def encode_pixels(self, pixel_values: Tensor) -> Tensor:
        return self.project_features(self._selected_rows(pixel_values))

    def _selected_rows(self, pixel_values: Tensor) -> Tensor:
        """[images, num_rows, width]: the selected hidden states side by side."""
        facts = self.facts
        shape = (pixel_values.shape[0], facts.num_rows, len(facts.feature_layers), facts.hidden_size)
        rows = torch.empty(shape, dtype=self._dtype, device=pixel_values.device)
        first = 0 if facts.keeps_class_row else 1
        for index, state in enumerate(self.vision.clip.hidden_states(pixel_values)):
            for place, layer in enumerate(facts.feature_layers):
                if layer == index:
                    rows[:, :, place] = state[:, first:]
        return rows.flatten(2)

    def project_features(self, features: Tensor) -> Tensor:
        projected: Tensor = self.vision.projector(features)
        return projected
