"""Texts of clients that spell special tokens: marked before a template is rendered, found again in what it wrote."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

_PRIVATE_USE = range(0xF0000, 0xFFFFE)
_RANDOM = secrets.SystemRandom()


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a template wrote, without marks.

    special_spans: where the template itself wrote special tokens, [start, end) in `text`, in order.
    is_spelled: whether `text` spells special tokens anywhere else; those are text.
    """

    text: str
    special_spans: tuple[tuple[int, int], ...]
    is_spelled: bool


class SpecialText:
    """The special tokens of a tokenizer, as text.

    They are its added tokens that are marked special, and the image placeholder. Added tokens that are not marked
    special are ordinary vocabulary: they count wherever they stand.

    ids: text -> token id. in_normalized: whether some are also found where the normalized text alone spells them, in
    lower case for example.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, image_token_id: int | None) -> None:
        added = tokenizer.added_tokens_decoder
        ids = [one for one in sorted(added) if (added[one].special or one == image_token_id) and added[one].content]
        self.ids: dict[str, int] = {added[one].content: one for one in ids}
        # The model of the vocabulary itself writes the unknown token.
        self._known = set(self.ids.values()) - {tokenizer.unk_token_id}
        # Longest first, as the tokenizer finds them.
        self._pattern = re.compile("|".join(re.escape(token) for token in sorted(self.ids, key=len, reverse=True)))
        self._in_any_case = re.compile(self._pattern.pattern, re.IGNORECASE)
        lowered = [token.lower() for token in self.ids]
        self._prefixes = {token[:end] for token in lowered for end in range(1, len(token))}
        self._suffixes = {token[start:] for token in lowered for start in range(1, len(token))}
        self._all = "\0".join(lowered)
        self._longest = max(map(len, self.ids), default=1)
        normalizes = tokenizer.backend_tokenizer.normalizer is not None
        self.in_normalized = normalizes and any(added[one].normalized for one in ids)

    @property
    def any_of(self) -> str:
        """A regular expression for one of them."""
        return self._pattern.pattern or "(?!)"

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where `text` spells special tokens, [start, end), in order."""
        return [match.span() for match in self._pattern.finditer(text)] if self.ids else []

    def spans_in_any_case(self, text: str) -> list[tuple[int, int]]:
        """Where `text` would spell special tokens if its letters were changed to lower or upper case."""
        return [match.span() for match in self._in_any_case.finditer(text)] if self.ids else []

    def only_at(self, spans: Sequence[tuple[int, int]], encoding: Encoding) -> bool:
        """Whether the special tokens of a tokenized text all come from the `spans` of the text."""
        tokens = zip(encoding.ids, encoding.offsets, encoding.special_tokens_mask, strict=True)
        found = [span for token_id, span, is_added in tokens if token_id in self._known and not is_added]
        return all(any(start < span[1] and span[0] < end for start, end in spans) for span in found)

    def begins_inside(self, text: str) -> bool:
        """Whether what stands before `text` could make a special token of its beginning."""
        start = text[: self._longest].lower()
        if self._is_inside(text):
            return True
        return any(start[:end] in self._suffixes for end in range(1, len(start) + 1))

    def ends_inside(self, text: str) -> bool:
        """Whether what stands behind `text` could make a special token of its end."""
        end = text[-self._longest :].lower()
        if self._is_inside(text):
            return True
        return any(end[start:] in self._prefixes for start in range(len(end)))

    def _is_inside(self, text: str) -> bool:
        return 0 < len(text) < self._longest and text.lower() in self._all


class Marks:
    """Marks for the texts of one conversation: three characters of the private-use area that occur in none of them.

    A spelled special token stands between `opening` and `closing`, in any case, which the template may change; the
    template still sees it whole. `edge` stands at the beginning or the end of a message's text where that could grow
    into a special token beside other text.
    """

    def __init__(self, special: SpecialText, texts: Iterable[str]) -> None:
        used = set().union(*texts)
        if len(used) > len(_PRIVATE_USE) // 2:
            raise ValueError(f"messages hold {len(used)} different characters: too many to be text")
        self._special = special
        free: list[str] = []
        while len(free) < 3:
            character = chr(_RANDOM.choice(_PRIVATE_USE))
            if character not in used and character not in free:
                free.append(character)
        self._opening, self._closing, self._edge = free
        self._mark = re.compile(f"{self._opening}((?i:{special.any_of})){self._closing}|[{''.join(free)}]")

    def message_text(self, text: str) -> str:
        """A message's own text, marked."""
        before = self._edge if self._special.begins_inside(text) else ""
        after = self._edge if self._special.ends_inside(text) else ""
        return f"{before}{self.text(text)}{after}"

    def text(self, text: str) -> str:
        """Any other text of a client, marked where it spells a special token."""
        marked, end = [], 0
        for start, stop in self._special.spans_in_any_case(text):
            marked += [text[end:start], self._opening, text[start:stop], self._closing]
            end = stop
        return "".join([*marked, text[end:]])

    def data(self, value: Any) -> Any:
        """A copy of JSON data with every text marked, keys too."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(key): self.data(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.data(item) for item in value]
        return value

    def removed(self, text: str) -> str:
        """The text without marks."""
        return self._mark.sub(lambda match: match.group(1) or "", text)

    def read(self, rendered: str) -> Rendered:
        """Takes the marks out of what a template wrote.

        A special token counts as the template's where it lies between two marks next to each other: it is no part of a
        marked text, and no edge of one lies within it.
        """
        pieces, spans, position = list(self._pieces(rendered)), [], 0
        for piece, is_spelled in pieces:
            if not is_spelled:
                spans += [(position + start, position + end) for start, end in self._special.spans(piece)]
            position += len(piece)
        text = "".join(piece for piece, _ in pieces)
        return Rendered(text, tuple(spans), is_spelled=self._special.spans(text) != spans)

    def _pieces(self, rendered: str) -> Iterator[tuple[str, bool]]:
        """The text between marks, and whether it is a marked spelling."""
        end = 0
        for match in self._mark.finditer(rendered):
            yield rendered[end : match.start()], False
            if match.group(1) is not None:
                yield match.group(1), True
            end = match.end()
        yield rendered[end:], False
