"""Text from tokens as they come, never half a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# The end of the prompt decides whether the answer's first token carries a leading space.
_CONTEXT_TOKENS = 6
# Tokens that have shown nothing are decoded again with each token. No character takes so many: these are special
# tokens left out, or bytes that make none.
_MAX_HELD_TOKENS = 32


class Detokenizer:
    """One answer's text. Bytes that do not make a character yet are held back until they do or the answer ends."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool
    ) -> None:
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        self._skip = skip_special_tokens
        self._token_ids: list[int] = []
        self._num_told = 0  # tokens that are not held back
        self._num_visible = 0  # up to the last of them that had text
        self._text = ""
        self._context = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        if self._decode(self._context).endswith("\ufffd"):
            self._context = []  # half a character: a stream would show these tokens as its own
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=skip_special_tokens)

    @property
    def text(self) -> str:
        """The text so far."""
        return self._text

    def add(self, token: int) -> str:
        """Takes the answer's next token; returns the text that it completes."""
        self._token_ids.append(token)
        try:
            piece = self._stream.step(self._tokenizer, token)
        except Exception:
            # Bytes that can never make a character break a stream of the library.
            piece = self._give_up()
        if piece is None:
            if len(self._token_ids) - self._num_told < _MAX_HELD_TOKENS:
                return ""
            piece = self._give_up()
        self._num_told = len(self._token_ids)
        if piece:
            self._num_visible = self._num_told
            self._text += piece
        return piece

    def hold(self, tokens: Sequence[int]) -> None:
        """Takes the answer's last tokens, whose text nobody waits for: `finish` returns it."""
        self._token_ids += tokens

    def finish(self) -> str:
        """Returns what was held back: an unfinished character becomes U+FFFD, as in decoding the whole."""
        whole = self._decode(self._context + self._token_ids)
        shown = self._decode(self._context) + self._text
        # What was shown stands, even where decoding the whole would have spelt it otherwise.
        piece = whole[len(shown) :] if whole.startswith(shown) else self._decode(self._token_ids[self._num_told :])
        self._text += piece
        return piece

    def _give_up(self) -> str:
        """The text of the tokens held, as it stands; a new stream begins behind them, or where none of them has text,
        behind the last that had."""
        held = self._decode(self._token_ids[self._num_told :])
        end = len(self._token_ids) if held else self._num_visible
        recent = (self._context + self._token_ids[:end])[-_CONTEXT_TOKENS:]
        if self._decode(recent).endswith("\ufffd"):
            recent = []
        self._stream = DecodeStream(ids=recent, skip_special_tokens=self._skip)
        return held

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)
        return text
