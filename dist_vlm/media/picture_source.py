"""Pictures that come inside a text: data: URLs."""

from __future__ import annotations

import base64
import binascii
import re
from io import BytesIO

from PIL import Image, UnidentifiedImageError

from dist_vlm.media.picture import DEFAULT_MAX_PIXELS, FORMATS, PictureError

DEFAULT_MAX_BYTES = 64 << 20
_HEAD = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
# Longer than any head that is meant; the rest of a URL is not searched for one.
_HEAD_CHARACTERS = 64


def open_data_url(
    url: str, *, name: str, max_pixels: int = DEFAULT_MAX_PIXELS, max_bytes: int = DEFAULT_MAX_BYTES
) -> Image.Image:
    """The picture of a URL `data:image/<type>;base64,<data>`, its header read and its pixels not decoded yet: `to_rgb`
    decodes them. The data decide the format, not the type that the URL names.

    name: what messages call the picture. max_bytes: longest file, without the encoding.
    Raises `PictureError` for another kind of URL, data that are not strictly base64 (no white space, padded), too long,
    no picture, or a picture with more than `max_pixels`.
    """
    head = _HEAD.match(url[:_HEAD_CHARACTERS])
    if head is None:
        raise PictureError(f"{name}: must begin like data:image/png;base64,")
    length = 3 * ((len(url) - head.end()) // 4)
    if length > max_bytes + 2:  # the padding may stand for two bytes
        raise PictureError(f"{name}: about {length} bytes; at most {max_bytes} are allowed")
    try:
        data = base64.b64decode(url[head.end() :].encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise PictureError(f"{name}: the data after {head.group()!r} are not base64") from None
    if len(data) > max_bytes:
        raise PictureError(f"{name}: {len(data)} bytes; at most {max_bytes} are allowed")
    return _opened(data, name=name, max_pixels=max_pixels)


def _opened(data: bytes, *, name: str, max_pixels: int) -> Image.Image:
    try:
        picture = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise PictureError(f"{name}: not a picture, or of a format that is not served") from None
    except Image.DecompressionBombError:
        raise PictureError(f"{name}: far more pixels than a picture may have (at most {max_pixels})") from None
    except Exception as error:  # decoders raise many types on damaged headers
        raise PictureError(f"{name}: the picture is damaged or truncated ({type(error).__name__})") from None
    width, height = picture.size
    if width * height > max_pixels:
        raise PictureError(f"{name}: {width}x{height} is {width * height} pixels; at most {max_pixels} are allowed")
    return picture
