"""Pictures from files and from callers, checked before any of their pixels is decoded."""

from __future__ import annotations

import logging
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

_log = logging.getLogger(__name__)

DEFAULT_MAX_PIXELS = 67_108_864
# Decoders that read pixels and nothing else; PIL has others that start programs or follow links.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


class PictureError(ValueError):
    """A picture that cannot be used. The message is ours: never the decoder's own."""


def load_image(path: str | Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Reads a picture file into RGB, turned upright by its EXIF orientation.

    Raises `PictureError` if the file is missing, no picture, damaged, empty, or larger than `max_pixels`.
    """
    try:
        with Image.open(path, formats=FORMATS) as picture:
            return to_rgb(picture, max_pixels=max_pixels, name=str(path))
    except FileNotFoundError:
        raise PictureError(f"{path}: there is no such file") from None
    except UnidentifiedImageError:
        raise PictureError(f"{path}: not a picture, or of a format that is not served") from None
    except Image.DecompressionBombError:
        raise PictureError(f"{path}: far more pixels than a picture may have (at most {max_pixels})") from None
    except OSError as error:
        raise PictureError(f"{path}: cannot be read ({type(error).__name__})") from None


def to_rgb(picture: Image.Image, *, max_pixels: int = DEFAULT_MAX_PIXELS, name: str = "image") -> Image.Image:
    """Decodes a picture and converts it to RGB, upright. The size is checked first, from the header alone.

    Raises `PictureError` for a picture without pixels, with more than `max_pixels`, or that does not decode.
    """
    width, height = picture.size
    if width < 1 or height < 1:
        raise PictureError(f"{name}: {width}x{height} has no pixels; each side must be at least 1")
    if width * height > max_pixels:
        raise PictureError(f"{name}: {width}x{height} is {width * height} pixels; at most {max_pixels} are allowed")
    try:
        picture.load()
        upright = ImageOps.exif_transpose(picture)
        return upright.convert("RGB")
    except Exception as error:
        # Decoders raise many types on damaged data; their text may quote memory, so it goes to the log alone.
        _log.debug("%s does not decode", name, exc_info=True)
        raise PictureError(f"{name}: the picture is damaged or truncated ({type(error).__name__})") from None
