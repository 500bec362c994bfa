"""Which beginnings of sequences lie in the KV blocks already, and which are being computed right now."""

from __future__ import annotations

from dataclasses import dataclass

from dist_vlm.sched.block_hash import BlockHasher
from dist_vlm.sched.block_pool import BlockPool
from dist_vlm.sched.request import Request


@dataclass(slots=True)
class PrefixCacheStats:
    """Counts since the start, over the requests that looked.

    num_queried_tokens, num_hit_tokens: tokens known when a request began, and those of them found cached.
    """

    num_queried_tokens: int = 0
    num_hit_tokens: int = 0


class PrefixCache:
    """Blocks of the pool by their content.

    A block is published once a step that sampled for its sequence has come back: every rank has then computed all that
    lies before the sampled token. A sequence that asked for its prompt's log probabilities uses no cached block, since
    those come from computing, but publishes its own.
    """

    def __init__(self, pool: BlockPool, *, enabled: bool = True, hasher: BlockHasher | None = None) -> None:
        self.enabled = enabled
        self.stats = PrefixCacheStats()
        self._pool = pool
        self._hasher = hasher or BlockHasher(pool.block_size)
        self._computing: dict[bytes, Request] = {}

    def look_ahead(self, request: Request) -> None:
        """Does what `find` will ask for and what depends on the request alone: its blocks' digests."""
        if self.enabled:
            self._known_digests(request)

    def find(self, request: Request) -> list[int]:
        """The blocks of the longest cached beginning. At least one token is left: its logits are wanted."""
        blocks: list[int] = []
        if not self.enabled or request.sampling.prompt_logprobs is not None:
            return blocks
        for digest in self._known_digests(request):
            block = self._pool.find(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def is_worth_waiting(self, request: Request, num_found: int) -> bool:
        """Whether a running request is computing at least half of what this one would have to compute itself."""
        if not self._computing or not self.enabled or request.sampling.prompt_logprobs is not None:
            return False
        digests = self._known_digests(request)[num_found:]
        count = next((i for i, digest in enumerate(digests) if digest not in self._computing), len(digests))
        remaining = request.num_tokens - num_found * self._pool.block_size
        return 2 * count * self._pool.block_size >= remaining

    def begin(self, request: Request, num_found: int) -> None:
        """Records what a request that starts to run found, and what it is about to compute."""
        if not self.enabled:
            return
        if request.sampling.prompt_logprobs is None:
            self.stats.num_queried_tokens += request.num_tokens
            self.stats.num_hit_tokens += num_found * self._pool.block_size
        request.num_published = num_found
        for digest in self._known_digests(request)[num_found:]:
            self._computing.setdefault(digest, request)

    def publish(self, request: Request, num_positions: int) -> None:
        """Offers the full blocks of the first `num_positions` positions, which all ranks have computed."""
        count = num_positions // self._pool.block_size
        if not self.enabled or count <= request.num_published:
            return
        digests = self._digests(request, count)
        for index in range(request.num_published, count):
            self._pool.publish(request.block_ids[index], digests[index])
            self._stop_computing(request, digests[index])
        request.num_published = count

    def end(self, request: Request) -> None:
        """A request stops running: what it had not published yet nobody need wait for."""
        for digest in request.block_digests[request.num_published :]:
            self._stop_computing(request, digest)
        request.num_published = 0

    def _stop_computing(self, request: Request, digest: bytes) -> None:
        if self._computing.get(digest) is request:
            del self._computing[digest]

    def _known_digests(self, request: Request) -> list[bytes]:
        """Of all full blocks but one that would leave no token to compute."""
        count = (request.num_tokens - request.num_pending - 1) // self._pool.block_size
        return self._digests(request, count)[:count]

    def _digests(self, request: Request, num_blocks: int) -> list[bytes]:
        if len(request.block_digests) < num_blocks:
            tokens = request.known_tokens(num_blocks * self._pool.block_size)
            root = self._hasher.root(salt=request.cache_salt)
            self._hasher.extend(request.block_digests, tokens, request.images, root=root, num_blocks=num_blocks)
        return request.block_digests
