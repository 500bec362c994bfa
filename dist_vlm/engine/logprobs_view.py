"""Log probabilities as clients see them: by token id, with the tokens' texts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dist_vlm.outputs import Logprob
from dist_vlm.workers.plan import TokenLogprobs

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


class TokenTexts:
    """The text of single tokens, a leading space included."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        self._texts: dict[int, str] = {}
        # Some decoders strip the first token's space, so none is decoded as the first.
        self._anchor = self._tokenizer.encode("a", add_special_tokens=False).ids[-1:]
        self._num_anchor_characters = len(self._decode(self._anchor))

    def __getitem__(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._decode([*self._anchor, token])[self._num_anchor_characters :]
        return self._texts[token]

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text


def logprobs_view(
    token: int, entry: TokenLogprobs, *, num_alternatives: int, texts: TokenTexts | None
) -> dict[int, Logprob]:
    """The token at a position first, then the likeliest in descending order, with the token among them or beside them.

    texts: None leaves the tokens' texts out.
    """
    view = {token: Logprob(entry.logprob, entry.rank, texts[token] if texts is not None else None)}
    pairs = zip(entry.top_ids[:num_alternatives], entry.top_logprobs[:num_alternatives], strict=True)
    rank, last = 0, math.inf
    for place, (other, logprob) in enumerate(pairs, start=1):
        if logprob < last:
            rank, last = place, logprob
        if other != token:
            view[other] = Logprob(logprob, rank, texts[other] if texts is not None else None)
    return view
