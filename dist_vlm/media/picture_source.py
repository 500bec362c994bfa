"""Pictures that come as bytes: whole files, and those inside a text, data: URLs."""

from __future__ import annotations

import binascii
import re
from io import BytesIO

from PIL import Image

from dist_vlm.media.picture import DEFAULT_MAX_PIXELS, PictureError, open_picture

DEFAULT_MAX_BYTES = 64 << 20
_HEAD = re.compile(rb"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
# Longer than any head that is meant; the rest of a URL is not searched for one.
_HEAD_BYTES = 64


def open_data_url(
    url: str | bytes | bytearray,
    *,
    name: str,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> Image.Image:
    """The picture of a URL `data:image/<type>;base64,<data>`, its header read and its pixels not decoded yet: `to_rgb`
    decodes them. The data decide the format, not the type that the URL names.

    url: as text, or as that text's bytes. name: what messages call the picture. max_bytes: longest file, without the
        encoding.
    Raises `PictureError` for another kind of URL, data that are not strictly base64 (no white space, padded), too long,
    no picture, or a picture with more than `max_pixels`.
    """
    if isinstance(url, str):
        # What is not ASCII becomes a question mark, which is not of base64 either.
        url = url.encode("ascii", "replace")
    head = _HEAD.match(url[:_HEAD_BYTES])
    if head is None:
        raise PictureError(f"{name}: must begin like data:image/png;base64,")
    length = 3 * ((len(url) - head.end()) // 4)
    if length > max_bytes + 2:  # the padding may stand for two bytes
        raise PictureError(f"{name}: about {length} bytes; at most {max_bytes} are allowed")
    try:
        data = binascii.a2b_base64(memoryview(url)[head.end() :], strict_mode=True)
    except binascii.Error:
        raise PictureError(f"{name}: the data after {head.group().decode()!r} are not base64") from None
    return open_file(data, name=name, max_pixels=max_pixels, max_bytes=max_bytes)


def open_file(
    data: bytes, *, name: str, max_pixels: int = DEFAULT_MAX_PIXELS, max_bytes: int = DEFAULT_MAX_BYTES
) -> Image.Image:
    """The picture of a file's bytes, its header read and its pixels not decoded yet. Raises `PictureError`."""
    if len(data) > max_bytes:
        raise PictureError(f"{name}: {len(data)} bytes; at most {max_bytes} are allowed")
    return open_picture(BytesIO(data), name=name, max_pixels=max_pixels)


def check_length(source: str | bytes, *, name: str, max_bytes: int) -> None:
    """Refuses what `open_data_url` (a text) or `open_file` (bytes) would find too long, without looking into it."""
    length = 3 * ((len(source) - _HEAD_BYTES) // 4) if isinstance(source, str) else len(source)
    if length > max_bytes:
        raise PictureError(f"{name}: about {length} bytes; at most {max_bytes} are allowed")
