"""What transformers' own model answers, one prompt at a time in float32: the tokens to equal."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

# One prompt at a time is too little for more: where there are many cores, their threads would wait for one another.
_MAX_THREADS = 4


@dataclass(frozen=True, eq=False)
class Case:
    """A prompt in the modern form, with one <image> placeholder or none."""

    prompt: str
    image: Image.Image | None

    @property
    def images(self) -> list[Image.Image]:
        return [] if self.image is None else [self.image]


class Reference:
    """One checkpoint in transformers."""

    def __init__(self, checkpoint: Path) -> None:
        torch.set_num_threads(min(_MAX_THREADS, torch.get_num_threads()))
        self.model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(checkpoint, backend="pil")

    def _inputs(self, prompt: str, images: list[Image.Image]) -> dict[str, Any]:
        return self.processor(images=images or None, text=[prompt], return_tensors="pt")

    def token_ids(self, case: Case) -> list[int]:
        """The prompt's tokens, the image expanded."""
        return self._inputs(case.prompt, case.images)["input_ids"][0].tolist()

    @torch.inference_mode()
    def greedy(self, prompt: str, images: list[Image.Image], max_tokens: int, *, ignore_eos: bool = False) -> list[int]:
        """The generated tokens, the end-of-sequence token included where it came."""
        inputs = self._inputs(prompt, images)
        settings = copy.deepcopy(self.model.generation_config)
        settings.update(do_sample=False, max_new_tokens=max_tokens)
        if ignore_eos:
            # None would be filled in again from the checkpoint; no token has this id.
            settings.eos_token_id = self.model.config.text_config.vocab_size
        tokens = self.model.generate(**inputs, generation_config=settings)
        return tokens[0, inputs["input_ids"].shape[1] :].tolist()

    @torch.inference_mode()
    def tower_features(self, case: Case) -> torch.Tensor:
        """The vision tower's output before the projector, [1, rows, width]."""
        tower = self.model.model.vision_tower(
            self._inputs(case.prompt, case.images)["pixel_values"], output_hidden_states=True, return_dict=True
        )
        layer = self.model.config.vision_feature_layer
        return tower.hidden_states[layer][:, 1:]


@functools.cache
def reference_for(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@functools.cache
def _expected(checkpoint: Path, case: Case, max_tokens: int, ignore_eos: bool) -> list[int]:
    return reference_for(checkpoint).greedy(case.prompt, case.images, max_tokens, ignore_eos=ignore_eos)


def expected_tokens(
    checkpoint: Path, cases: Sequence[Case], max_tokens: int, *, ignore_eos: bool = False
) -> list[list[int]]:
    """Computed once for each case, whatever points ask for it."""
    return [_expected(checkpoint, case, max_tokens, ignore_eos) for case in cases]
