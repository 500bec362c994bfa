"""The name of an image by its content, under which it is staged, encoded and found again."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image


def content_key(content: Image.Image | np.ndarray, *, settings: str) -> str:
    """BLAKE2b-128, in hex, over what decides an image's features.

    content: decoded pixels, or an array. Mode, size, shape and dtype count, not the bytes alone: two pictures
        with the same bytes in another shape are different.
    settings: what turns this content into features (the processor's digest, the kind of array).
    """
    if isinstance(content, Image.Image):
        kind, data = f"{content.mode} {content.size[0]}x{content.size[1]}", content.tobytes()
    else:
        kind, data = f"{content.dtype} {content.shape}", np.ascontiguousarray(content).tobytes()
    digest = hashlib.blake2b(digest_size=16)
    for part in (settings.encode(), kind.encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    digest.update(data)
    return digest.hexdigest()
