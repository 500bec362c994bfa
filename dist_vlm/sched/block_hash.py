"""What a KV block holds, as a digest: two blocks with one digest hold the same keys and values.

    digest[i] = BLAKE2b-128(key, digest[i - 1] | token ids | images), digest[-1] = BLAKE2b-128(key, adapter | salt)

A position that an image fills counts as (the image's content key, its row), not as its placeholder token, so the same
text with another picture shares nothing from the picture on. Keys and values depend on all positions before them,
which is why a digest covers its predecessor. The key is random, so that nobody outside can make two contents collide.
Aumasson et al., "BLAKE2", 2013.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence
from hashlib import blake2b

from dist_vlm.sched.features import overlapping
from dist_vlm.workers.plan import ImageSpan

DIGEST_BYTES = 16


class BlockHasher:
    """key: random unless given; digests of two keys have nothing in common."""

    def __init__(self, block_size: int, *, key: bytes | None = None) -> None:
        self.block_size = block_size
        self._key = secrets.token_bytes(DIGEST_BYTES) if key is None else key

    def root(self, *, salt: str, adapter: str = "") -> bytes:
        """What stands before a sequence's first block: requests with different roots share nothing."""
        return self._digest(*(part for text in (adapter, salt) for part in _sized(text.encode())))

    def extend(
        self,
        digests: list[bytes],
        token_ids: Sequence[int],
        images: Sequence[ImageSpan],
        *,
        root: bytes,
        num_blocks: int,
    ) -> None:
        """Appends digests until there are `num_blocks` of them. token_ids: at least those of so many blocks."""
        for index in range(len(digests), num_blocks):
            start, end = index * self.block_size, (index + 1) * self.block_size
            parent = digests[-1] if digests else root
            digests.append(self._block_digest(parent, token_ids[start:end], start, overlapping(images, start, end)))

    def _block_digest(self, parent: bytes, token_ids: Sequence[int], start: int, spans: Sequence[ImageSpan]) -> bytes:
        tokens = array("q", token_ids)
        parts: list[bytes] = []
        for span in spans:
            low, high = max(span.start, start), min(span.end, start + len(tokens))
            tokens[low - start : high - start] = array("q", [0] * (high - low))
            parts += _sized(span.image.encode())
            parts.append(array("q", [low - start, high - start, low - span.start]).tobytes())
        return self._digest(parent, tokens.tobytes(), *parts)

    def _digest(self, *parts: bytes) -> bytes:
        digest = blake2b(digest_size=DIGEST_BYTES, key=self._key)
        for part in parts:
            digest.update(part)
        return digest.digest()


def _sized(data: bytes) -> tuple[bytes, bytes]:
    """The data behind its length, so that one part's end cannot pass for another's beginning."""
    return len(data).to_bytes(8, "little"), data
