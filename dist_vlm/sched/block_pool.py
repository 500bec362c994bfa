"""The KV blocks of a launch: which are free, and how many holders each of the others has."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence


class BooksError(RuntimeError):
    """The scheduler's books do not add up: a defect of this program, never of a request."""


class BlockPool:
    """Reference-counted block ids 0 .. num_blocks - 1, the same on every rank.

    A block is free or held by one or more sequences; free + held == total at all times (`check`).
    Freed blocks are handed out again oldest first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks={num_blocks}, block_size={block_size}: both must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(num_blocks))
        self._holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that cover `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> tuple[int, ...]:
        """Takes `count` free blocks with one holder each. Raises `BooksError` if there are not as many."""
        if count > len(self._free):
            raise BooksError(f"{count} blocks asked for, {len(self._free)} free")
        taken = tuple(self._free.popleft() for _ in range(count))
        for block in taken:
            self._holders[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a holder to blocks that are held."""
        for block in blocks:
            if self._holders[block] == 0:
                raise BooksError(f"block {block} is free and cannot be shared")
            self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Takes one holder from each block; a block without holders is free."""
        for block in blocks:
            if self._holders[block] == 0:
                raise BooksError(f"block {block} is free already")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free.append(block)

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Raises `BooksError` unless `held`, one block list a sequence, accounts for every block not free."""
        expected = Counter(block for blocks in held for block in blocks)
        actual = {block: holders for block, holders in enumerate(self._holders) if holders}
        if expected != actual:
            raise BooksError(f"sequences hold {dict(expected)}, the pool counts {actual}")
        free = set(self._free)
        if len(free) != len(self._free) or free & set(actual) or len(free) + len(actual) != self.num_blocks:
            raise BooksError(f"{len(self._free)} free + {len(actual)} held blocks are not {self.num_blocks}")
