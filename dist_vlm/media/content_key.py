"""The name of an image by its content, under which it is staged, encoded and found again."""

from __future__ import annotations

import hashlib

import numpy as np


def content_key(array: np.ndarray, *, settings: str) -> str:
    """BLAKE2b-128, in hex, over what decides an image's features: what the ranks are given, and nothing before it.

    array: as it is staged. Shape and dtype count, not the bytes alone: two arrays with the same bytes in another shape
        are different.
    settings: what else tells contents apart (the processor's digest, the kind of array).
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in (settings.encode(), f"{array.dtype} {array.shape}".encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
