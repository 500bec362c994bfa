"""The name of an image by its content, under which it is staged, encoded and found again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

# Nothing else runs in Python while a part of a picture's bytes is made; while it is hashed, others do.
_PART_BYTES = 1 << 17


def content_key(content: Image.Image | np.ndarray, *, settings: str) -> str:
    """BLAKE2b-128, in hex, over what decides an image's features.

    content: decoded pixels, or an array. Mode, size, shape and dtype count, not the bytes alone: two pictures
        with the same bytes in another shape are different.
    settings: what turns this content into features (the processor's digest, the kind of array).
    """
    if isinstance(content, Image.Image):
        kind, parts = f"{content.mode} {content.size[0]}x{content.size[1]}", _parts(content)
    else:
        kind, parts = f"{content.dtype} {content.shape}", iter([np.ascontiguousarray(content).tobytes()])
    digest = hashlib.blake2b(digest_size=16)
    for part in (settings.encode(), kind.encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    for data in parts:
        digest.update(data)
    return digest.hexdigest()


def _parts(picture: Image.Image) -> Iterator[bytes]:
    """What `tobytes` gives of a picture, a few rows at a time: it is never held twice."""
    width, height = picture.size
    rows = max(1, _PART_BYTES // max(1, width * len(picture.getbands())))
    for top in range(0, height, rows):
        yield picture.crop((0, top, width, min(height, top + rows))).tobytes()
