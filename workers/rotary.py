"""Rotary frequencies of a sequence, for every scaling type that transformers computes.

    angle[t, i] = position[t] * frequency_i(length[t]),  cos and sin of it times the type's attention factor

Those of the type "default" are computed here, without transformers; the others come from its own functions
(`modeling_rope_utils.ROPE_INIT_FUNCTIONS`). For most types they are fixed. For the types that look at the sequence's
length each token takes those of the length its batch gives, and nothing is carried from step to step, so neither
chunking nor the neighbours in a batch change them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rope_types() -> tuple[str, ...]:
    """The types that can be computed, by the names of `rope_parameters["rope_type"]`."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ("default", *sorted(ROPE_INIT_FUNCTIONS))


class RotaryFrequencies:
    """cos and sin tables of a model.

    config: a transformers text configuration; of the type "default" anything with its `rope_parameters` ("rope_type",
        "rope_theta") and `head_dim`.
    head_dim: size of a head; frequencies cover its first `rotary_dim` entries.
    """

    def __init__(self, config: Any, *, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._dtype = dtype
        self._device = device
        self.rope_type: str = config.rope_parameters["rope_type"]
        if self.rope_type != "default" and self.rope_type not in rope_types():
            raise ValueError(f"rope_type is {self.rope_type!r}, must be one of {', '.join(rope_types())}")
        self._fixed, self._attention_factor = self._frequencies(None)
        self.rotary_dim = 2 * self._fixed.shape[-1]
        if self.rotary_dim > head_dim:
            raise ValueError(f"rope_type {self.rope_type!r} rotates {self.rotary_dim} of {head_dim} head entries")
        self._switch_length, self._long = 0, self._fixed
        if self.rope_type == "longrope":
            self._switch_length = int(config.rope_parameters["original_max_position_embeddings"])
            self._long, _ = self._frequencies(torch.tensor(self._switch_length + 1))
        self._table: tuple[Tensor, Tensor] | None = None

    def tabulate(self, num_positions: int) -> None:
        """Computes cos and sin of all positions below `num_positions`, the only ones asked for from here on, once."""
        if not self._depends_on_length:
            self._table = self._cos_sin(torch.arange(num_positions, device=self._device), self._fixed)

    @property
    def _depends_on_length(self) -> bool:
        return self.rope_type == "longrope" or "dynamic" in self.rope_type

    def _frequencies(self, length: Tensor | None) -> tuple[Tensor, float]:
        """float32 [..., rotary_dim / 2] and the factor of cos and sin."""
        if self.rope_type == "default":
            parameters = self._config.rope_parameters
            steps = torch.arange(0, self._config.head_dim, 2, dtype=torch.float) / self._config.head_dim
            return (1.0 / (parameters["rope_theta"] ** steps)).to(self._device), 1.0
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, factor = ROPE_INIT_FUNCTIONS[self.rope_type](self._config, self._device, seq_len=length)
        return frequencies.to(self._device), float(factor)

    def __call__(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [T, rotary_dim] of the model's dtype, the halves alike.

        positions: int64 [T]. lengths: int64 [T], the sequence length each token's frequencies are for.
        """
        if self._table is not None:
            return self._table[0].index_select(0, positions), self._table[1].index_select(0, positions)
        return self._cos_sin(positions, self._frequencies_of(lengths))

    def _cos_sin(self, positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.unsqueeze(1).float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self._attention_factor, angles.sin() * self._attention_factor
        return cos.to(self._dtype), sin.to(self._dtype)

    def _frequencies_of(self, lengths: Tensor) -> Tensor:
        """float32 [T, rotary_dim / 2], or [rotary_dim / 2] where all tokens share them."""
        if self.rope_type == "longrope":
            return torch.where((lengths > self._switch_length).unsqueeze(1), self._long, self._fixed)
        if not self._depends_on_length:
            return self._fixed
        # The functions are elementwise in the length: a column of lengths gives a row of frequencies for each.
        frequencies, _ = self._frequencies(lengths.unsqueeze(1))
        if frequencies.shape != (lengths.shape[0], self._fixed.shape[-1]):
            raise RuntimeError(f"rope_type {self.rope_type!r}: transformers gave shape {list(frequencies.shape)}")
        return frequencies
