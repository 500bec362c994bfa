"""A file of requests, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input, as far as it could be read.

    index: its number in the file, from 1, blank lines counted.
    id: what its owner calls it, else the index.
    values: the object's other keys; empty where there is a problem.
    problem: why it is no request; None if it may be one.
    """

    index: int
    id: str | int
    values: dict[str, Any]
    problem: str | None = None


def read_lines(file: Iterable[bytes], *, first: int = 1) -> Iterator[Line]:
    """The lines of an input, one at a time, blank ones left out. A line that cannot be read is told as such.

    first: number of the first line that `file` has.
    """
    for index, raw in enumerate(file, first):
        if not is_blank(raw, index):
            yield parse_line(raw, index)


def is_blank(raw: bytes, index: int) -> bool:
    return not _unmarked(raw, index).strip()


def parse_line(raw: bytes, index: int) -> Line:
    """A line that is not blank, out of its bytes."""
    try:
        return _parsed(_unmarked(raw, index), index)
    except RecursionError:
        return Line(index, index, {}, "the line is nested too deeply")


def _unmarked(raw: bytes, index: int) -> bytes:
    return raw.removeprefix(_BYTE_ORDER_MARK) if index == 1 else raw


def _parsed(content: bytes, index: int) -> Line:
    try:
        values = json.loads(content.decode("utf-8").rstrip())
    except UnicodeDecodeError:
        return Line(index, index, {}, "the line is not UTF-8 text")
    except ValueError as error:
        place = f": {error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        return Line(index, index, {}, f"the line is not JSON{place}")
    if not isinstance(values, dict):
        return Line(index, index, {}, f"the line is a JSON {type(values).__name__}; must be an object")
    name = values.pop("id", None)
    if name is None:
        name = index
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        return Line(index, index, {}, f"id = {name!r}: must be a string or an integer")
    return Line(index, name, values)
