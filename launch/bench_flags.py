"""Numbers on the command line of `dist-vlm bench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Protocol

Parse = Callable[[str], int]


class Flags(Protocol):
    """What a measurement adds its flags to."""

    def add_argument(self, *names: str, **options: Any) -> Any: ...


def whole(low: int) -> Parse:
    """Reads an integer, at least `low`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) >= low):
            raise argparse.ArgumentTypeError(f"{text!r}: must be an integer, at least {low}, of at most 9 digits")
        return int(text)

    return parse


def several(text: str) -> tuple[int, ...]:
    """Reads integers from 1 on, with commas between them; one that is there twice counts once."""
    return tuple(dict.fromkeys(whole(1)(part) for part in text.split(",")))


def two_lengths(text: str) -> tuple[int, int]:
    """Reads two integers from 2 on, the second above the first."""
    parts = [whole(2)(part) for part in text.split(",")]
    if len(parts) != 2 or parts[1] <= parts[0]:
        raise argparse.ArgumentTypeError(f"{text!r}: must be two integers, the second above the first")
    return parts[0], parts[1]
