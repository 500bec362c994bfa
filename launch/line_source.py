"""The lines of an input that have no answer yet, in parts that are read when they are asked for."""

from __future__ import annotations

import io
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from dist_vlm.launch.jsonl import is_blank

LINES_OF_A_PART = 8
# Each is a task; the driver keeps something of all of them.
MAX_PARTS = 20_000


def part_size(num_lines: int) -> int:
    """Lines of a part, so that an input of so many lines has at most `MAX_PARTS`."""
    return max(LINES_OF_A_PART, -(-num_lines // MAX_PARTS))


class LineParts:
    """Where the parts of an input begin: a few bytes a part, not the lines.

    has_answer: by a line's number; asked once, at the making.
    num_lines: those without an answer, in all parts.
    """

    def __init__(
        self, file: Iterable[bytes], has_answer: Callable[[int], bool], *, size: int = LINES_OF_A_PART
    ) -> None:
        self._starts, self._ends = array("Q"), array("Q")
        self._first = array("Q")
        self._answered: dict[int, list[int]] = {}
        self.num_lines = 0
        position, in_part = 0, size
        for index, raw in enumerate(file, 1):
            if not is_blank(raw, index):
                if has_answer(index):
                    if in_part < size:
                        self._answered.setdefault(len(self) - 1, []).append(index)
                else:
                    if in_part == size:
                        self._starts.append(position)
                        self._ends.append(position)
                        self._first.append(index)
                        in_part = 0
                    in_part += 1
                    self.num_lines += 1
                    self._ends[-1] = position + len(raw)
            position += len(raw)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, file: BinaryIO, part: int) -> Iterator[tuple[int, bytes]]:
        """The lines of a part that have no answer: their numbers, and their bytes as they stand in the input."""
        file.seek(self._starts[part])
        content = file.read(self._ends[part] - self._starts[part])
        answered = self._answered.get(part, ())
        for index, raw in enumerate(io.BytesIO(content), self._first[part]):
            if not is_blank(raw, index) and index not in answered:
                yield index, raw


class LineSource:
    """An actor on the driver's machine, where the input is; the others need not see that file."""

    def __init__(self, path: str, parts: LineParts) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - as long as the actor lives
        self._parts = parts

    def part(self, number: int) -> list[tuple[int, bytes]]:
        """Not parsed: what a line holds may be nested deeper than can be pickled."""
        return list(self._parts.read(self._file, number))
