"""The KV blocks of a launch: which are free, how many holders each of the others has, and what the cached ones hold."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence


class BooksError(RuntimeError):
    """The scheduler's books do not add up: a defect of this program, never of a request."""


class BlockPool:
    """Reference-counted block ids 0 .. num_blocks - 1, the same on every rank.

    A block is held by one or more sequences, or cached (held by none, its content published under a digest), or free;
    free + held + cached == total at all times (`check`). Free blocks are handed out oldest first; once they are used up
    the cached block released longest ago loses its content and is handed out.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks={num_blocks}, block_size={block_size}: both must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_evictions = 0
        self._free = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * num_blocks
        self._digest_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_allocatable(self) -> int:
        """Blocks that `allocate` can hand out: the free ones, and the cached ones in exchange for their content."""
        return len(self._free) + len(self._cached)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_allocatable

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that cover `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> tuple[int, ...]:
        """Takes `count` blocks with one holder each. Raises `BooksError` if there are not as many."""
        if count == 0:
            return ()
        if count > self.num_allocatable:
            raise BooksError(f"{count} blocks asked for, {self.num_allocatable} free or cached")
        taken = tuple(self._free.popleft() if self._free else self._evict() for _ in range(count))
        for block in taken:
            self._holders[block] = 1
        return taken

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._digest_of.pop(block)]
        self.num_evictions += 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a holder to blocks that are held or cached."""
        for block in blocks:
            if self._holders[block] == 0 and block not in self._cached:
                raise BooksError(f"block {block} is free and cannot be shared")
            self._cached.pop(block, None)
            self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Takes one holder from each block; a block without holders is cached if published, else free."""
        for block in blocks:
            if self._holders[block] == 0:
                raise BooksError(f"block {block} is free already")
            self._holders[block] -= 1
            if self._holders[block] > 0:
                continue
            if block in self._digest_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    # ---------------------------------------------------------------- content

    def publish(self, block: int, digest: bytes) -> None:
        """Lets `find` answer `digest` with a held block. The first block of a content keeps the name."""
        if self._holders[block] == 0:
            raise BooksError(f"block {block} is not held and cannot be published")
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def find(self, digest: bytes) -> int | None:
        """The held or cached block with this content, if there is one."""
        return self._block_of.get(digest)

    def num_revived(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` sharing would take from the cached ones."""
        return sum(1 for block in blocks if block in self._cached)

    # ------------------------------------------------------------------ books

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Raises `BooksError` unless `held`, one block list a sequence, accounts for every block not free or cached."""
        expected = Counter(block for blocks in held for block in blocks)
        actual = {block: holders for block, holders in enumerate(self._holders) if holders}
        if expected != actual:
            raise BooksError(f"sequences hold {dict(expected)}, the pool counts {actual}")
        places = [*self._free, *self._cached, *actual]
        if len(set(places)) != len(places) or len(places) != self.num_blocks:
            raise BooksError(
                f"{len(self._free)} free + {len(actual)} held + {len(self._cached)} cached blocks are not "
                f"{self.num_blocks}"
            )
        if {digest: block for block, digest in self._digest_of.items()} != self._block_of:
            raise BooksError("the digests of blocks and the blocks of digests contradict each other")
        if any(block not in self._digest_of for block in self._cached) or set(self._free) & set(self._digest_of):
            raise BooksError("a cached block has no digest, or a free one has")
