"""The usual steps of a CLIP image processor, taken at once: scale a picture, keep its middle, look its values up.

transformers turns the picture into an array and back, and computes its values in float64. Here PIL scales the picture
as it is, and what becomes of each of a channel's 256 values is in a table that transformers itself has filled; the
ranks look it up. That gives the same numbers to the last bit, in a fraction of the time.
"""

from __future__ import annotations

import logging
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from dist_vlm.workers.beside import run_beside
from dist_vlm.workers.coded_pixels import blank_coded, decoded, places_of

_log = logging.getLogger(__name__)

# Wider than high and made smaller, higher than wide and made larger; both far from the model's shape.
_PROBE_SHAPES = ((500, 739, 3), (31, 17, 3))


@dataclass(frozen=True, slots=True)
class ScaledCrop:
    """shortest_edge: of the scaled picture, in pixels. height, width: of the part kept, at most that long.
    resample: PIL's filter. levels: float32 [3, 256], for each channel what becomes of each value.
    """

    shortest_edge: int
    height: int
    width: int
    resample: int
    levels: np.ndarray

    def __call__(self, picture: Image.Image, *, helpers: Executor | None = None) -> np.ndarray:
        """An RGB picture -> its part as coded pixels.

        helpers: threads for the channels. To scale each by itself gives the same, sooner, for more work in all.
        """
        if helpers is not None:
            return self.by_channel(picture, helpers)
        coded = self._blank()
        places_of(coded)[0] = self._scaled(picture).transpose(2, 0, 1)
        return coded

    def by_channel(self, picture: Image.Image, helpers: Executor | None) -> np.ndarray:
        coded = self._blank()
        channels = zip(picture.split(), places_of(coded)[0], strict=True)
        run_beside(helpers, [partial(self._scale_into, places, band) for band, places in channels])
        return coded

    def _blank(self) -> np.ndarray:
        return blank_coded(self.levels, height=self.height, width=self.width)

    def _scale_into(self, places: np.ndarray, band: Image.Image) -> None:
        places[:] = self._scaled(band)

    def _scaled(self, picture: Image.Image) -> np.ndarray:
        """The part kept: uint8 [height, width] of a single channel, else [height, width, 3]."""
        scaled = picture.resize(self._scaled_size(*picture.size), resample=Image.Resampling(self.resample))
        left, top = (scaled.width - self.width) // 2, (scaled.height - self.height) // 2
        return np.asarray(scaled.crop((left, top, left + self.width, top + self.height)))

    def _scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height; the longer side is rounded down."""
        shorter, longer = sorted((width, height))
        scaled = int(self.shortest_edge * longer / shorter)
        return (self.shortest_edge, scaled) if width <= height else (scaled, self.shortest_edge)


def scaled_crop(processor: Any) -> ScaledCrop | None:
    """What gives the same as `processor`, an image processor of transformers' PIL backend; None where its settings ask
    for other steps."""
    settings = processor.to_dict()
    size, crop = dict(settings.get("size") or {}), dict(settings.get("crop_size") or {})
    resample = settings.get("resample")
    is_usual = (
        all(settings.get(step) for step in ("do_resize", "do_center_crop"))
        and not settings.get("do_pad")
        and size.keys() == {"shortest_edge"}
        and crop.keys() == {"height", "width"}
        and max(crop.values()) <= size["shortest_edge"]  # otherwise it is padded
        and isinstance(resample, int)
    )
    if not is_usual:
        return None
    made = ScaledCrop(size["shortest_edge"], crop["height"], crop["width"], int(resample), _levels(processor))
    return made if _agree(made, processor) else None


def _levels(processor: Any) -> np.ndarray:
    """float32 [3, 256]: what the processor makes of a picture that holds every value once."""
    ramp = np.arange(256, dtype=np.uint8)
    picture = Image.fromarray(np.stack([ramp] * 3, axis=-1)[None])
    levels = processor(images=picture, do_resize=False, do_center_crop=False, return_tensors="np")["pixel_values"]
    return np.ascontiguousarray(levels[0, :, 0], dtype=np.float32)


def _agree(made: ScaledCrop, processor: Any) -> bool:
    """Whether both give the same for pictures of noise: another transformers may have learned a setting more."""
    for seed, shape in enumerate(_PROBE_SHAPES):
        picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))
        expected = processor(images=picture, return_tensors="np")["pixel_values"]
        if not all(np.array_equal(decoded(ours), expected) for ours in (made(picture), made.by_channel(picture, None))):
            _log.warning("transformers' image processor does something unforeseen: pictures go through it, slowly")
            return False
    return True
