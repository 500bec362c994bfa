"""Pictures to pixel tensors, as transformers' own image processor makes them in its PIL backend.

transformers has two backends that differ in their resampling, and picks by what is installed; here the PIL class is
named, so torchvision is never used.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dist_vlm.workers.coded_pixels import places_of
from dist_vlm.workers.models.family import ImageProcessor
from dist_vlm.workers.models.json_fields import Fields, read_object
from dist_vlm.workers.models.llava import known_processors
from dist_vlm.workers.models.llava.known_processors import KnownProcessor
from dist_vlm.workers.models.llava.scaled_crop import ScaledCrop, scaled_crop
from dist_vlm.workers.models.spec import CheckpointError

# `image_processor_type` of a checkpoint, without the suffix of a backend -> module and class.
PROCESSORS = {
    "CLIPImageProcessor": ("transformers.models.clip.image_processing_pil_clip", "CLIPImageProcessorPil"),
    "LlavaImageProcessor": ("transformers.models.llava.image_processing_pil_llava", "LlavaImageProcessorPil"),
}


class PilImageProcessor(ImageProcessor):
    """See `ImageProcessor`. The usual settings are served by `ScaledCrop`, others by transformers: decided here, once,
    and kept for later processes.

    path: directory with preprocessor_config.json, or with its content under "image_processor" in
        processor_config.json.
    output_shape: shape of one image's pixel values, as the vision tower takes it.
    Raises `CheckpointError` where the files are missing, name another processor, or give another shape.
    """

    def __init__(self, path: str, output_shape: tuple[int, int, int, int]) -> None:
        fields = _settings(Path(path))
        kind = str(fields.values.get("image_processor_type")).removesuffix("Fast").removesuffix("Pil")
        if kind not in PROCESSORS:
            raise fields.error("image_processor_type", " or ".join(PROCESSORS))
        module, name = PROCESSORS[kind]
        self._processor: Any = None
        self._scaled_crop: ScaledCrop | None
        known = known_processors.find(name, fields.values)
        if known is not None:
            self._digest, self._scaled_crop = known.digest, known.scaled_crop
        else:
            self._processor = getattr(importlib.import_module(module), name).from_dict(fields.values)
            serialized = json.dumps([name, self._processor.to_dict()], sort_keys=True, default=str).encode()
            self._digest = hashlib.blake2b(serialized, digest_size=16).hexdigest()
            self._scaled_crop = scaled_crop(self._processor)
            if self._scaled_crop is not None:
                known_processors.keep(name, fields.values, KnownProcessor(self._digest, self._scaled_crop))
        probe = self.preprocess(Image.new("RGB", (8, 5)))
        shape = probe.shape if self._scaled_crop is None else places_of(probe).shape
        if shape != output_shape:
            raise CheckpointError(
                f"{fields.file}: the image processor gives shape {list(shape)}, the vision tower takes"
                f" {list(output_shape)}"
            )

    def preprocess(self, image: Image.Image, *, helpers: Executor | None = None) -> np.ndarray:
        if self._scaled_crop is not None:
            return self._scaled_crop(image, helpers=helpers)
        pixels = self._processor(images=image, return_tensors="np")["pixel_values"]
        return np.ascontiguousarray(pixels, dtype=np.float32)

    @property
    def digest(self) -> str:
        return self._digest


def _settings(directory: Path) -> Fields:
    own, combined = directory / "preprocessor_config.json", directory / "processor_config.json"
    if combined.is_file() and isinstance(nested := read_object(combined).get("image_processor"), dict):
        return Fields(combined, nested, "image_processor")
    if own.is_file():
        return Fields(own, read_object(own))
    raise CheckpointError(f"{own} is missing, and {combined.name} has no image_processor")
