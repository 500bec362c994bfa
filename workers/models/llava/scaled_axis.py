"""One direction of a picture that is scaled, and of which the middle is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

# PIL takes places in a picture in single precision: exactly where they are multiples of this, and no picture is longer.
_PLACES, _MAX_LENGTH = 64, 1 << 17


@dataclass(frozen=True, slots=True)
class ScaledAxis:
    """`length` pixels, scaled to `scaled`, of which `count` from `start` on are kept.

    Of a part alone PIL makes what it makes of it in the whole, to the last bit, if the part's ends can be told exactly
    in the pixels of the picture. That they can at every `step`-th scaled pixel, and at both ends of the whole.
    """

    length: int
    scaled: int
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def step(self) -> int:
        if self.length > _MAX_LENGTH:
            return self.scaled
        return self.scaled // math.gcd(_PLACES * self.length, self.scaled)

    def parts(self, most: int) -> list[tuple[int, int]]:
        """What is kept, in at most that many parts of about one size: each from a scaled pixel to behind another, with
        what must be made beside it so that its ends are exact."""
        low, high = self.start // self.step, -(-self.end // self.step)
        most = min(most, high - low)
        edges = [self.step * (low + (high - low) * place // most) for place in range(most + 1)]
        return list(zip(edges, edges[1:], strict=False))

    def place(self, scaled: int) -> float:
        """Where a scaled pixel begins in the picture; exact for the ends of parts."""
        return scaled * self.length / self.scaled

    def needed(self, low: int, high: int, *, support: float) -> tuple[int, int]:
        """The picture's pixels that a part is made of, by a filter that reaches so many pixels far; those of the scaled
        picture where it is made smaller."""
        reach = support * max(1.0, self.length / self.scaled) + 1
        return max(0, math.floor(self.place(low) - reach)), min(self.length, math.ceil(self.place(high) + reach))
