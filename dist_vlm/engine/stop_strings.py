"""Strings that end an answer, found in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string, and where it ends in the piece that completed it."""

    string: str
    end: int


class _Pattern:
    """A stop string and its failure function (Knuth, Morris, Pratt 1977): what of it still matches after a mismatch."""

    def __init__(self, string: str) -> None:
        self.string = string
        self._fallback = [0] * (len(string) + 1)
        matched = 0
        for end in range(1, len(string)):
            matched = self.advance(matched, string[end])
            self._fallback[end + 1] = matched

    def advance(self, matched: int, char: str) -> int:
        """How many of the string's first characters the text ends with after `char`, if it was `matched` before."""
        string = self.string
        if matched == len(string):
            matched = self._fallback[matched]
        while matched and string[matched] != char:
            matched = self._fallback[matched]
        return matched + 1 if string[matched] == char else 0

    def unfinished(self, matched: int) -> int:
        """How much of that may still become the string; a whole one may not, but what it ends with."""
        return self._fallback[matched] if matched == len(self.string) else matched


class StopStrings:
    """The stop strings of a request. Each of its answers has a `StopWatch` of its own."""

    def __init__(self, strings: Sequence[str]) -> None:
        # The longest of those that are complete at once is the one that was met.
        self.patterns = tuple(_Pattern(string) for string in sorted(set(strings), key=len, reverse=True))

    def watch(self) -> StopWatch:
        return StopWatch(self.patterns)


class StopWatch:
    """Reads one answer's text, each character once."""

    def __init__(self, patterns: tuple[_Pattern, ...]) -> None:
        self._patterns = patterns
        self._matched = [0] * len(patterns)

    def read(self, piece: str, *, counts: bool = True) -> StopMatch | None:
        """The stop string that is complete first in the text so far, if that is in this piece.

        counts: whether one that is complete in this piece ends the answer.
        """
        if not self._patterns:
            return None
        matched = self._matched
        for place, char in enumerate(piece):
            for index, pattern in enumerate(self._patterns):
                matched[index] = pattern.advance(matched[index], char)
            if counts:
                for index, pattern in enumerate(self._patterns):
                    if matched[index] == len(pattern.string):
                        return StopMatch(pattern.string, place + 1)
        return None

    @property
    def num_held(self) -> int:
        """How many of the text's last characters may be the beginning of a stop string."""
        if not self._patterns:
            return 0
        pairs = zip(self._patterns, self._matched, strict=True)
        return max((pattern.unfinished(matched) for pattern, matched in pairs), default=0)
