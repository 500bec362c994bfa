"""Which encoded images the ranks hold, and which requests still need them."""

from __future__ import annotations

from collections.abc import Iterable

from dist_vlm.workers.plan import ImageSpan


class FeatureTable:
    """Encoded images by content key. Requests with the same image share its features.

    An image stays on the ranks from the step that encodes it until no request needs it; the next plan then
    tells them to drop it.
    """

    def __init__(self) -> None:
        self._needed_by: dict[str, set[str]] = {}
        self._droppable: dict[str, None] = {}

    @property
    def num_resident(self) -> int:
        return len(self._needed_by) + len(self._droppable)

    def is_resident(self, image: str) -> bool:
        return image in self._needed_by or image in self._droppable

    def need(self, image: str, request_id: str) -> bool:
        """Records that a request needs the image from this plan on; true if the plan must encode it."""
        encode = not self.is_resident(image)
        self._droppable.pop(image, None)
        self._needed_by.setdefault(image, set()).add(request_id)
        return encode

    def give_up(self, images: Iterable[str], request_id: str) -> None:
        """Ends a request's need of images, whether or not it had any."""
        for image in images:
            needed_by = self._needed_by.get(image)
            if needed_by is None:
                continue
            needed_by.discard(request_id)
            if not needed_by:
                del self._needed_by[image]
                self._droppable[image] = None

    def lose(self, image: str) -> None:
        """Records that the ranks failed to encode the image: they hold nothing of it."""
        self._needed_by.pop(image, None)
        self._droppable.pop(image, None)

    def take_droppable(self) -> tuple[str, ...]:
        """The images the next plan drops; they are forgotten here."""
        images = tuple(self._droppable)
        self._droppable.clear()
        return images


def overlapping(images: Iterable[ImageSpan], start: int, end: int) -> list[ImageSpan]:
    """The spans that share a position with [start, end)."""
    return [span for span in images if span.start < end and span.end > start]
