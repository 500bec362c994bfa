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


class Detokenizer:
    """One answer's text. Bytes that do not make a character yet are held back until they do or the answer ends."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool
    ) -> None:
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        self._context = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        self._skip = skip_special_tokens
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=skip_special_tokens)
        self._token_ids: list[int] = []
        self._num_shown = 0
        self.text = ""

    def add(self, token_ids: Sequence[int]) -> None:
        """Takes the answer's next tokens."""
        for token in token_ids:
            self._token_ids.append(token)
            piece = self._step(token)
            if piece is not None:
                self.text += piece
                self._num_shown = len(self._token_ids)

    def _step(self, token: int) -> str | None:
        """The text that a token completes. Bytes that can never make a character break a stream of the library, which
        then starts anew behind them."""
        try:
            return self._stream.step(self._tokenizer, token)
        except Exception:
            held = self._tokenizer.decode(self._token_ids[self._num_shown :], skip_special_tokens=self._skip)
            recent = (self._context + self._token_ids)[-_CONTEXT_TOKENS:]
            self._stream = DecodeStream(ids=recent, skip_special_tokens=self._skip)
            return held

    def finish(self) -> None:
        """Adds what was held back: an unfinished character becomes U+FFFD, as in decoding the whole."""
        before = self._tokenizer.decode(self._context, skip_special_tokens=self._skip)
        whole = self._tokenizer.decode(self._context + self._token_ids, skip_special_tokens=self._skip)
        # What was streamed stands, even where decoding the whole would have spelt it otherwise.
        if whole.startswith(before + self.text):
            self.text = whole[len(before) :]
        else:
            held = self._token_ids[self._num_shown :]
            self.text += self._tokenizer.decode(held, skip_special_tokens=self._skip)
