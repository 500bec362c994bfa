"""Log probabilities in place of a rank's, where nothing is computed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from dist_vlm.workers.plan import PromptLogprobs, Slice, TokenLogprobs

_HALF = math.log(0.5)


def of_token(token: int, num_alternatives: int) -> TokenLogprobs:
    """The token is the likeliest, half of all; the others follow by their ids, each half as likely as the last."""
    others = (other for other in itertools.count() if other != token)
    ranked = itertools.islice(itertools.chain((token,), others), num_alternatives)
    return TokenLogprobs(_HALF, 1, tuple(ranked), tuple(_HALF * place for place in range(1, num_alternatives + 1)))


def of_prompt(piece: Slice, tokens: Sequence[int], *, num_prompt: int, num_alternatives: int) -> PromptLogprobs:
    """What a slice tells of its sequence's prompt. tokens: of the sequence, the first `num_prompt` the prompt."""
    told = tokens[piece.start + 1 : min(piece.start + piece.count + 1, num_prompt)]
    return PromptLogprobs(piece.slot, piece.start + 1, tuple(of_token(token, num_alternatives) for token in told))
