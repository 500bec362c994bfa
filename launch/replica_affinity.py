"""Which replica a request should meet: the one that holds its beginning, unless that one has far more to do.

Each replica's prefix cache is followed from outside: the digests of the blocks that requests sent to it have left
there. A request follows its beginning where at least half of its prompt is held, unless the holder is ahead of the
least loaded replica by too many requests. What nobody holds goes to the replica that was sent the fewest tokens, among
those that are not ahead either: where a picture goes first, all that ask about it will follow. So a picture asked about
again meets its own keys and values, new ones spread evenly, and one that everybody asks about is soon held by several.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# What an answer is expected to be long at most, where a request allows more.
_EXPECTED_TOKENS = 512
# A replica is ahead when it has half as many requests again as the least loaded one, and so many more.
_LEAD = 4
# Of so many tokens the older half counts half.
_WINDOW = 1 << 18


@dataclass(frozen=True, slots=True)
class Claim:
    """What is known of a request before it runs.

    digests: of the prompt's full blocks, each covering those before it (`sched/block_hash.py`).
    num_tokens: the prompt's, and of an answer that was begun. max_tokens: of the answer.
    """

    digests: tuple[bytes, ...]
    num_tokens: int
    max_tokens: int


@dataclass(slots=True)
class _Replica:
    """num_blocks: of its KV cache. held: digests, the one used longest ago first. total: tokens sent there, the older
    ones counting less. open: requests, each with the tokens until its answer is there."""

    num_blocks: int
    total: int
    held: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    open: dict[str, int] = field(default_factory=dict)

    @property
    def work(self) -> int:
        return sum(self.open.values())


class Affinity:
    """Not safe for use from several threads.

    block_size: positions in a block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._replicas: dict[str, _Replica] = {}

    def update(self, num_blocks: Mapping[str, int]) -> None:
        """The replicas there are now, each with the blocks of its KV cache. Of others everything is forgotten."""
        self._replicas = {name: one for name, one in self._replicas.items() if name in num_blocks}
        for name, count in num_blocks.items():
            if name not in self._replicas:
                # As if it had had its share, or everything new would go to the newest.
                total = min((one.total for one in self._replicas.values()), default=0)
                self._replicas[name] = _Replica(count, total)
            self._replicas[name].num_blocks = count

    def rank(self, names: Iterable[str], claim: Claim) -> list[str]:
        """Those of the names that `update` told, the best first."""
        known = {name: self._replicas[name] for name in names if name in self._replicas}
        if not known:
            return []
        limit = 1.5 * min(len(one.open) for one in known.values()) + _LEAD

        def key(name: str) -> tuple[bool, int, int, str]:
            replica = known[name]
            num_held = self._num_held(replica, claim)
            # A system prompt that all of them share must not decide.
            counts = 2 * num_held >= claim.num_tokens
            return len(replica.open) > limit, -num_held if counts else 0, replica.total + replica.work, name

        return sorted(known, key=key)

    def begin(self, name: str, request_id: str, claim: Claim) -> None:
        """A request has been sent to a replica, which will hold its prompt."""
        replica = self._replicas.get(name)
        if replica is None:
            return
        num_new = claim.num_tokens - self._num_held(replica, claim)
        replica.open[request_id] = num_new + min(claim.max_tokens, _EXPECTED_TOKENS)
        replica.total += claim.num_tokens
        if sum(one.total for one in self._replicas.values()) > _WINDOW:
            for one in self._replicas.values():
                one.total //= 2
        # The end of a prompt is the first to go, as in the cache itself.
        for digest in reversed(claim.digests):
            replica.held[digest] = None
            replica.held.move_to_end(digest)
        while len(replica.held) > replica.num_blocks:
            replica.held.popitem(last=False)

    def end(self, name: str, request_id: str) -> None:
        """Nothing if it is unknown."""
        replica = self._replicas.get(name)
        if replica is not None:
            replica.open.pop(request_id, None)

    def _num_held(self, replica: _Replica, claim: Claim) -> int:
        """Tokens of the prompt's beginning that the replica holds."""
        for index, digest in enumerate(claim.digests):
            if digest not in replica.held:
                return index * self._block_size
        return len(claim.digests) * self._block_size
