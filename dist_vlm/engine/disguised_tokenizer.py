"""A tokenizer that no text can make write a special token."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_log = logging.getLogger(__name__)

# A name is digits alone: no normalizer changes them, and no character behind them merges with them.
_SECRET_DIGITS = 30
_INDEX_DIGITS = 7


class DisguisedTokenizer:
    """A copy of a tokenizer in which special tokens have secret names in place of their own, with the same ids.

    So the tokenizer itself splits a text at the special tokens that are meant and treats the parts between them as it
    always does (a leading space or none, for example), and a text that spells one's own name is a text like any other.

    special: the own names and their ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, special: Mapping[str, int]) -> None:
        self._source = tokenizer.backend_tokenizer
        self._special = special
        self._ids = frozenset(special.values()) - {tokenizer.unk_token_id}
        self._rename()

    def encode(self, text: str, spans: Sequence[tuple[int, int]], *, add_special_tokens: bool) -> list[int]:
        """The tokens of `text`, in which exactly the `spans` are special tokens.

        spans: [start, end), in order, each the own name of a special token. add_special_tokens: whether those are added
        that the tokenizer puts around a text. Raises `ValueError` where the vocabulary itself makes a special token of
        plain text.
        """
        while self._secret in text:
            self._rename()
        pieces, end = [], 0
        for start, stop in spans:
            pieces += [text[end:start], self._names[text[start:stop]]]
            end = stop
        encoding = self._copy.encode("".join([*pieces, text[end:]]), add_special_tokens=add_special_tokens)
        inside = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        made = [token_id for token_id, is_added in inside if token_id in self._ids and not is_added]
        meant = [token_id for start, stop in spans if (token_id := self._special[text[start:stop]]) in self._ids]
        if made != meant:
            raise ValueError("the prompt spells a special token, and this tokenizer cannot tell it from a real one")
        token_ids: list[int] = encoding.ids
        return token_ids

    def _rename(self) -> None:
        self._secret = "".join(secrets.choice("0123456789") for _ in range(_SECRET_DIGITS))
        self._names = {own: f"{self._secret}{index:0{_INDEX_DIGITS}}" for index, own in enumerate(self._special)}
        try:
            content = _renamed(json.loads(self._source.to_str()), self._names)
            if not self._found_normalized():
                for token in content["added_tokens"]:
                    token["normalized"] = False
            copy = Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # what the library raises has no type of its own
            _log.debug("the tokenizer cannot be copied", exc_info=True)
            raise ValueError(
                "the prompt spells a special token, and this tokenizer cannot be copied to read it as text "
                f"({type(error).__name__})"
            ) from None
        copy.no_truncation()
        copy.no_padding()
        copy.encode_special_tokens = False
        # A token that is looked for in normalized text is kept normalized itself: perhaps with a leading space.
        wrong = [own for own, name in self._names.items() if name not in (copy.id_to_token(self._special[own]) or "")]
        if wrong:
            raise ValueError(f"the prompt spells a special token, and {wrong[0]!r} cannot be renamed in this tokenizer")
        self._copy = copy

    def _found_normalized(self) -> bool:
        """Whether normalizing leaves a name findable inside a text. A normalizer that puts a space before any text puts
        it before the name that is looked for as well, and so finds it only behind a space."""
        normalizer = self._source.normalizer
        if normalizer is None:
            return True
        sought: str = normalizer.normalize_str(self._secret)
        return normalizer.normalize_str(f"x{self._secret}").endswith(sought)


def _renamed(content: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A tokenizer.json with other names for special tokens. Merges that make one of plain text are left out."""
    model = content["model"]
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in vocab.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, names)]
    return content


def _makes(merge: str | list[str], names: Mapping[str, str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names
