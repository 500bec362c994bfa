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
from dist_vlm.workers.models.llava.scaled_axis import ScaledAxis

_log = logging.getLogger(__name__)

# Filters by which a part of a picture can be made alone, and how far they reach. There they are zero: a rounding that
# counts one pixel more or less makes no difference. That of a box does, and to the nearest pixel PIL adds its way up.
_SUPPORT = {
    Image.Resampling.BILINEAR: 1.0,
    Image.Resampling.HAMMING: 1.0,
    Image.Resampling.BICUBIC: 2.0,
    Image.Resampling.LANCZOS: 3.0,
}
# The pixels of a picture that a thread is asked to help for, and the bands of one at most.
_BAND_PIXELS, _MAX_BANDS = 1 << 16, 4
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

        helpers: threads that may take bands of it, or channels. To scale each channel by itself gives the same, sooner,
            for more work in all.
        """
        if self.has_bands(picture):
            most = min(_MAX_BANDS, picture.width * picture.height // _BAND_PIXELS) if helpers is not None else 1
            return self.in_bands(picture, max(1, most), helpers)
        if helpers is not None:
            return self.by_channel(picture, helpers)
        coded = self._blank()
        _lay_out(places_of(coded)[0], self._scaled(picture))
        return coded

    def has_bands(self, picture: Image.Image) -> bool:
        """Whether parts of it can be made alone. PIL scales first across and then down where the picture is not higher
        than wide; in what order it scales others depends on its version and on their shape."""
        return self.resample in _SUPPORT and picture.width >= picture.height

    def in_bands(self, picture: Image.Image, most: int, helpers: Executor | None) -> np.ndarray:
        """In at most that many bands of rows; of columns, what is kept is made alone. For pictures that `has_bands`."""
        coded = self._blank()
        places = places_of(coded)[0]
        across, down = self._axes(*picture.size)
        (columns,) = across.parts(1)
        run_beside(
            helpers,
            [partial(self._band_into, places, picture, across, down, columns, rows) for rows in down.parts(most)],
        )
        return coded

    def _band_into(
        self,
        places: np.ndarray,
        picture: Image.Image,
        across: ScaledAxis,
        down: ScaledAxis,
        columns: tuple[int, int],
        rows: tuple[int, int],
    ) -> None:
        """Fills a band of `places`, uint8 [3, height, width]. columns, rows: of the scaled picture, to be made."""
        (left, right), (top, bottom) = columns, rows
        upper, lower = max(top, down.start), min(bottom, down.end)
        resample = Image.Resampling(self.resample)
        if picture.size == (across.scaled, down.scaled):
            band, left, top = picture, 0, 0
        else:
            first, last = down.needed(top, bottom, support=_SUPPORT[resample])
            band = picture.crop((0, first, picture.width, last))
            # One direction at a time: asked for both, PIL may take them in another order for a part than for the whole.
            box = (across.place(left), 0.0, across.place(right), float(band.height))
            band = band.resize((right - left, band.height), resample=resample, box=box)
            box = (0.0, down.place(top) - first, float(band.width), down.place(bottom) - first)
            band = band.resize((band.width, bottom - top), resample=resample, box=box)
        kept = band.crop((across.start - left, upper - top, across.end - left, lower - top))
        _lay_out(places[:, upper - down.start : lower - down.start], kept)

    def by_channel(self, picture: Image.Image, helpers: Executor | None) -> np.ndarray:
        coded = self._blank()
        channels = zip(picture.split(), places_of(coded)[0], strict=True)
        run_beside(helpers, [partial(self._scale_into, places, band) for band, places in channels])
        return coded

    def _blank(self) -> np.ndarray:
        return blank_coded(self.levels, height=self.height, width=self.width)

    def _scale_into(self, places: np.ndarray, band: Image.Image) -> None:
        places[:] = np.asarray(self._scaled(band))

    def _scaled(self, picture: Image.Image) -> Image.Image:
        """The part kept."""
        scaled = picture.resize(self._scaled_size(*picture.size), resample=Image.Resampling(self.resample))
        across, down = self._axes(*picture.size)
        return scaled.crop((across.start, down.start, across.end, down.end))

    def _axes(self, width: int, height: int) -> tuple[ScaledAxis, ScaledAxis]:
        """Across and down."""
        scaled_width, scaled_height = self._scaled_size(width, height)
        return (
            ScaledAxis(width, scaled_width, (scaled_width - self.width) // 2, self.width),
            ScaledAxis(height, scaled_height, (scaled_height - self.height) // 2, self.height),
        )

    def _scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height; the longer side is rounded down."""
        shorter, longer = sorted((width, height))
        scaled = int(self.shortest_edge * longer / shorter)
        return (self.shortest_edge, scaled) if width <= height else (scaled, self.shortest_edge)


def _lay_out(places: np.ndarray, picture: Image.Image) -> None:
    """Fills `places`, uint8 [3, height, width], from an RGB picture. PIL takes channels out of it sooner than numpy
    turns an array."""
    for place, channel in zip(places, "RGB", strict=True):
        place[:] = np.frombuffer(picture.tobytes("raw", channel), np.uint8).reshape(place.shape)


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
        ways = [made(picture), made.by_channel(picture, None)]
        if made.has_bands(picture):
            ways.append(made.in_bands(picture, _MAX_BANDS, None))
        if not all(np.array_equal(decoded(ours), expected) for ours in ways):
            _log.warning("transformers' image processor does something unforeseen: pictures go through it, slowly")
            return False
    return True
