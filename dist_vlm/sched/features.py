"""Which encoded images the ranks hold, which requests still need them, and which go when there is no room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from dist_vlm.workers.plan import ImageSpan


class FeatureTable:
    """Encoded images by content key. Requests with the same image share its features.

    An image stays on the ranks while a request needs it. After that it is kept for later requests until its rows are
    wanted for another image, the one unneeded longest going first; with `keep` off it goes with the next plan.

    capacity_rows: most feature rows the ranks hold at once; None is unlimited.
    """

    def __init__(self, capacity_rows: int | None = None, *, keep: bool = False) -> None:
        self.capacity_rows = capacity_rows
        self.keep = keep
        self.num_evictions = 0
        self._rows: dict[str, int] = {}
        self._needed_by: dict[str, set[str]] = {}
        self._unneeded: OrderedDict[str, None] = OrderedDict()
        self._to_drop: list[str] = []

    @property
    def num_resident(self) -> int:
        return len(self._rows)

    @property
    def num_rows(self) -> int:
        """Rows the ranks hold."""
        return sum(self._rows.values())

    def is_resident(self, image: str) -> bool:
        return image in self._rows

    def fits(self, spans: Iterable[ImageSpan]) -> bool:
        """Whether these images can all be on the ranks at once, beside what is needed there already."""
        if self.capacity_rows is None:
            return True
        wanted = {span.image: span.count for span in spans if span.image not in self._needed_by}
        return self._needed_rows() + sum(wanted.values()) <= self.capacity_rows

    def _needed_rows(self) -> int:
        return sum(self._rows[image] for image in self._needed_by)

    def need(self, spans: Sequence[ImageSpan], request_id: str) -> list[ImageSpan]:
        """Records that a request needs images from this plan on; returns those that the plan must encode, once each."""
        encode = []
        for span in spans:
            self._needed_by.setdefault(span.image, set()).add(request_id)
            self._unneeded.pop(span.image, None)
            if span.image not in self._rows:
                encode.append(span)
                self._rows[span.image] = span.count
        self._evict_to_fit()
        return encode

    def _evict_to_fit(self) -> None:
        while self.capacity_rows is not None and self._unneeded and self.num_rows > self.capacity_rows:
            image, _ = self._unneeded.popitem(last=False)
            self.num_evictions += 1
            self._drop(image)

    def _drop(self, image: str) -> None:
        del self._rows[image]
        self._to_drop.append(image)

    def give_up(self, images: Iterable[str], request_id: str) -> None:
        """Ends a request's need of images, whether or not it had any."""
        for image in images:
            needed_by = self._needed_by.get(image)
            if needed_by is None:
                continue
            needed_by.discard(request_id)
            if not needed_by:
                del self._needed_by[image]
                self._unneeded[image] = None

    def lose(self, image: str) -> None:
        """Records that the ranks failed to encode the image. What they may hold for it goes with the next plan."""
        self._needed_by.pop(image, None)
        self._unneeded.pop(image, None)
        if self._rows.pop(image, None) is not None:
            self._to_drop.append(image)

    def take_droppable(self) -> tuple[str, ...]:
        """The images the next plan drops; they are forgotten here."""
        if not self.keep:
            for image in self._unneeded:
                self._drop(image)
            self._unneeded.clear()
        images = tuple(self._to_drop)
        self._to_drop.clear()
        return images


def overlapping(images: Iterable[ImageSpan], start: int, end: int) -> list[ImageSpan]:
    """The spans that share a position with [start, end)."""
    return [span for span in images if span.start < end and span.end > start]
