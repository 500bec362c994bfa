"""Decoded pictures of any mode as people see them: 8-bit RGB, what is transparent over white.

Colour profiles are not applied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

_WHITE = (255, 255, 255)
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
_KEYED_MODES = ("1", "L", "RGB", "I", "I;16", "I;16L", "I;16B", "I;16N")
_PHOTOMETRIC, _BITS_PER_SAMPLE = 262, 258  # TIFF tags


class UnclearColours(ValueError):  # noqa: N818 - what is the matter, in words for the client
    """Samples that do not say what they look like."""


def transparent_colour(picture: Image.Image) -> int | tuple[int, ...] | None:
    """The one colour that a PNG without an alpha channel, or a grey GIF, declares transparent, in the scale of the
    picture's decoded samples. To be asked before the picture is decoded: then PIL no longer knows its depth.
    """
    key = picture.info.get("transparency")
    if picture.mode not in _KEYED_MODES or not isinstance(key, int if picture.mode != "RGB" else tuple):
        return None
    raw_mode = _raw_mode(picture)
    if isinstance(key, tuple):
        return tuple(value >> 8 for value in key) if raw_mode == "RGB;16B" else key
    # PIL scales samples of two and four bits to eight, but not the colour.
    return key * {"L;2": 85, "L;4": 17}.get(raw_mode, 1)


def as_rgb(picture: Image.Image, *, key: int | tuple[int, ...] | None = None) -> Image.Image:
    """A decoded picture in RGB; the picture itself if it is that already.

    key: its `transparent_colour`.

    Grey of 16 bits is scaled, not cut: 65535 is white (in the modes "I;16" and its kin; and in "I", whose values must
    lie in 0 .. 65535). Grey in floating point must lie in 0 .. 1. Raises `UnclearColours` where they do not, and for
    CIELAB.
    """
    hidden = None if key is None else _equal(picture, key)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        rgb = _grey(picture).convert("RGB")
    elif picture.mode in _ALPHA_MODES or (picture.mode == "P" and picture.has_transparency_data):
        rgb = _over_white(picture)
    elif picture.mode == "LAB":
        raise UnclearColours("its colours are CIELAB, which is not served; must be RGB, grey, palette or CMYK")
    elif picture.mode == "RGB":
        rgb = picture.copy() if "transparency" in picture.info else picture
    else:
        rgb = picture.convert("RGB")
    # Otherwise an image processor would apply it once more.
    rgb.info.pop("transparency", None)
    if hidden is not None:
        rgb.paste(_WHITE, mask=hidden)
    return rgb


def _over_white(picture: Image.Image) -> Image.Image:
    """Each channel is round((c * a + 255 * (255 - a)) / 255)."""
    if picture.mode == "La":
        picture = picture.convert("LA")
    rgba = picture if picture.mode == "RGBA" else picture.convert("RGBA")
    rgb = Image.new("RGB", picture.size, _WHITE)
    rgb.paste(rgba, mask=rgba)
    return rgb


def _grey(picture: Image.Image) -> Image.Image:
    """Samples of 16 bits, 32 bits or floating point in 8 bits, rounded to the nearest."""
    samples = np.asarray(picture)
    low, high = samples.min(), samples.max()
    if picture.mode == "F":
        if not (low >= 0 and high <= 1):  # not so for NaN either
            raise UnclearColours("its samples are floating-point numbers, and not all in 0 .. 1")
        levels = samples * np.float32(255)
        np.rint(levels, out=levels)
    else:
        most = _most_grey(picture)
        if low < 0 or high > most:
            raise UnclearColours(f"its samples are in {low} .. {high}; grey must be in 0 .. {most}")
        levels = samples.astype(np.uint32)
        # In place: of a large picture every copy counts.
        levels *= 255
        levels += most // 2
        levels //= most
    grey = levels.astype(np.uint8)
    # PIL inverts TIFFs whose 0 is white by itself where they have at most 8 bits.
    return Image.fromarray(255 - grey if _tiff_tag(picture, _PHOTOMETRIC) == 0 else grey)


def _most_grey(picture: Image.Image) -> int:
    """The largest sample there can be. PIL leaves those of 12 bits as they are."""
    return 4095 if _tiff_tag(picture, _BITS_PER_SAMPLE) == (12,) else 65535


def _equal(picture: Image.Image, key: int | tuple[int, ...]) -> Image.Image:
    """A mask of the pixels that have exactly the colour `key`."""
    same = np.asarray(picture.convert("L") if picture.mode == "1" else picture) == np.asarray(key)
    return Image.fromarray(same.all(axis=-1) if same.ndim == 3 else same)


def _raw_mode(picture: Image.Image) -> str:
    """How a PNG's samples are stored; empty for other formats and once it is decoded."""
    if picture.format != "PNG" or not (tiles := getattr(picture, "tile", None)):
        return ""
    args = tiles[0][3]
    return str(args[0] if isinstance(args, tuple) else args)


def _tiff_tag(picture: Image.Image, tag: int) -> Any:
    return picture.tag_v2.get(tag) if picture.format == "TIFF" and hasattr(picture, "tag_v2") else None
