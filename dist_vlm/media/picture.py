"""Pictures from files and from callers, checked before any of their pixels is decoded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from dist_vlm.media.rgb import UnclearColours, as_rgb, transparent_colour

_log = logging.getLogger(__name__)

DEFAULT_MAX_PIXELS = 67_108_864
# Decoders that read pixels and nothing else; PIL has others that start programs or follow links.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

_ORIENTATION = 0x0112
# How a picture was held -> what turns it upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(ValueError):
    """A picture that cannot be used. The message is ours: never the decoder's own."""


class PictureMemoryError(PictureError):
    """There is not enough memory to decode a picture."""


def load_image(path: str | Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Reads a picture file into RGB, as `to_rgb` does.

    Raises `PictureError` if the file is missing, no picture, damaged, empty, or larger than `max_pixels`.
    """
    try:
        with open(path, "rb") as file:
            picture = open_picture(file, max_pixels=max_pixels, name=str(path))
            return to_rgb(picture, max_pixels=max_pixels, name=str(path))
    except FileNotFoundError:
        raise PictureError(f"{path}: there is no such file") from None
    except OSError as error:
        raise PictureError(f"{path}: cannot be read ({type(error).__name__})") from None


def open_picture(file: IO[bytes], *, name: str, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """A picture whose header is read and whose pixels are not decoded yet; `to_rgb` decodes them. It has several
    frames or pages where the file has; the first is shown.

    Raises `PictureError` for no picture, a format that is not served, a damaged header, or more than `max_pixels`.
    """
    try:
        picture = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise PictureError(f"{name}: not a picture, or of a format that is not served") from None
    except Image.DecompressionBombError:
        raise PictureError(f"{name}: far more pixels than a picture may have (at most {max_pixels})") from None
    except Exception as error:
        raise _undecodable(error, name) from None
    _check_size(picture, max_pixels, name)
    return picture


def to_rgb(picture: Image.Image, *, max_pixels: int = DEFAULT_MAX_PIXELS, name: str = "image") -> Image.Image:
    """Decodes a picture and turns it into what people see: upright by its EXIF orientation, 8-bit RGB, over white where
    it is transparent (see `as_rgb`). The size is checked first, from the header alone.

    The result is the picture itself where nothing is to be changed, so that a large one is not held twice.
    Raises `PictureError` for a picture without pixels, with more than `max_pixels`, whose colours are unclear, or that
    does not decode.
    """
    _check_size(picture, max_pixels, name)
    try:
        key = transparent_colour(picture)
        picture.load()
        turn = _TURNS.get(_orientation(picture))
        rgb = as_rgb(picture, key=key)
        return rgb if turn is None else rgb.transpose(turn)
    except UnclearColours as error:
        raise PictureError(f"{name}: {error}") from None
    except Exception as error:
        raise _undecodable(error, name) from None


def _check_size(picture: Image.Image, max_pixels: int, name: str) -> None:
    width, height = picture.size
    if width < 1 or height < 1:
        raise PictureError(f"{name}: {width}x{height} has no pixels; each side must be at least 1")
    if width * height > max_pixels:
        raise PictureError(f"{name}: {width}x{height} is {width * height} pixels; at most {max_pixels} are allowed")


def _orientation(picture: Image.Image) -> int:
    """By EXIF; that of a picture without one, or with damaged EXIF, which does not keep people from seeing it, is 1."""
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:
        _log.debug("EXIF data that cannot be read", exc_info=True)
        return 1


def _undecodable(error: Exception, name: str) -> PictureError:
    """Decoders raise many types on damaged data; their text may quote memory, so it goes to the log alone."""
    _log.debug("%s does not decode", name, exc_info=error)
    if isinstance(error, MemoryError):
        return PictureMemoryError(f"{name}: decoding it needs more memory than there is")
    return PictureError(f"{name}: the picture is damaged or truncated ({type(error).__name__})")
