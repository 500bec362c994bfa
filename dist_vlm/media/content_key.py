"""The name of an image by its content, under which it is staged, encoded and found again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from functools import partial

import numpy as np
from PIL import Image

from dist_vlm.workers.beside import run_beside

# Nothing else runs in Python while a part of a picture's bytes is made; while it is hashed, others do.
_PART_BYTES = 1 << 17
# Of a picture, what is hashed by itself, so that several threads may do it, and the threads at most.
_LEAF_BYTES = 1 << 19
_MAX_TASKS = 4
_LEAF_DIGEST_BYTES = 32


def content_key(content: Image.Image | np.ndarray, *, settings: str, helpers: Executor | None = None) -> str:
    """BLAKE2b-128, in hex, over what decides an image's features; of a picture, over the digests of its rows.

    content: decoded pixels, or an array. Mode, size, shape and dtype count, not the bytes alone: two pictures
        with the same bytes in another shape are different.
    settings: what turns this content into features (the processor's digest, the kind of array).
    helpers: threads that may take parts of the work, as `run_beside` says; the key does not depend on them.
    """
    if isinstance(content, Image.Image):
        kind, data = f"{content.mode} {content.size[0]}x{content.size[1]}", _leaves(content, helpers)
    else:
        kind, data = f"{content.dtype} {content.shape}", np.ascontiguousarray(content).tobytes()
    digest = hashlib.blake2b(digest_size=16)
    for part in (settings.encode(), kind.encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    digest.update(data)
    return digest.hexdigest()


def _leaves(picture: Image.Image, helpers: Executor | None) -> bytes:
    """The digests of every so many rows, one behind the other. How many rows depends on the picture's kind alone."""
    width, height = picture.size
    row_bytes = max(1, width * len(picture.getbands()))
    leaf_rows = max(1, _LEAF_BYTES // row_bytes)
    tops = range(0, height, leaf_rows)
    each = max(1, -(-len(tops) // _MAX_TASKS)) if helpers is not None else max(1, len(tops))
    leaf = partial(_leaf, picture, leaf_rows, max(1, _PART_BYTES // row_bytes))
    tasks = [partial(_joined, leaf, tops[first : first + each]) for first in range(0, len(tops), each)]
    return b"".join(run_beside(helpers, tasks))


def _joined(leaf: Callable[[int], bytes], tops: Iterable[int]) -> bytes:
    return b"".join(map(leaf, tops))


def _leaf(picture: Image.Image, leaf_rows: int, part_rows: int, top: int) -> bytes:
    """The digest of the rows from `top` on, whose bytes are made a few rows at a time: it is never held twice."""
    width, height = picture.size
    bottom = min(height, top + leaf_rows)
    digest = hashlib.blake2b(digest_size=_LEAF_DIGEST_BYTES, person=b"rows")
    for upper in range(top, bottom, part_rows):
        digest.update(picture.crop((0, upper, width, min(bottom, upper + part_rows))).tobytes())
    return digest.digest()
