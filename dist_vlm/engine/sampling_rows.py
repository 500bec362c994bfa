"""From sampling parameters to what a rank needs of them."""

from __future__ import annotations

import hashlib
import itertools
from typing import TYPE_CHECKING

from dist_vlm.sampling import SamplingParams, refuse_unserved
from dist_vlm.workers.plan import SamplingRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from dist_vlm.workers.models import ModelSpec


class SamplingRows:
    """Checks sampling parameters against the model and the engine, and makes a row for each answer. Safe for use from
    several threads.

    seed: the engine's, from which those of requests without one are made.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerFast,
        spec: ModelSpec,
        seed: int,
        max_logprobs: int,
        serves_logits_processors: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = spec.vocab_size
        self._seed = seed
        self._max_logprobs = max_logprobs
        self._serves_logits_processors = serves_logits_processors
        self._spaces_special_tokens = _spaces_special_tokens(tokenizer)
        self._numbers = itertools.count(1)

    def check(self, params: SamplingParams) -> None:
        """Raises `ValueError` naming the field, its value and what is allowed."""
        refuse_unserved(params, serves_logits_processors=self._serves_logits_processors)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            if value is not None and value > self._max_logprobs:
                raise ValueError(f"{name} = {value}: must be at most max_logprobs = {self._max_logprobs}")
        for name, tokens in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            for token in tokens or ():
                if token >= self._vocab_size:
                    raise ValueError(f"{name} holds the token {token}: must be in 0 .. {self._vocab_size - 1}")
        if not (params.spaces_between_special_tokens or params.skip_special_tokens) and self._spaces_special_tokens:
            raise ValueError(
                "spaces_between_special_tokens = False: this tokenizer puts spaces between them; leave it at True"
            )

    def rows(
        self, params: SamplingParams, *, name: str, max_tokens: int, stop_token_ids: frozenset[int]
    ) -> tuple[SamplingRow, ...]:
        """One row for each of the best_of answers; they differ in their sample index.

        params: checked. name: of the request, under which its logits processors are registered.
        max_tokens, stop_token_ids: the request's own, see `EngineRequest`.
        """
        assert params.best_of is not None
        seed = 0
        if not params.is_greedy:
            seed = params.seed if params.seed is not None else self._next_seed()
        logit_bias = tuple((token, float(bias)) for token, bias in sorted((params.logit_bias or {}).items()))
        bad_words = self._bad_words(params)
        answer_logprobs = params.logprobs if params.logprobs is not None else 0
        return tuple(
            SamplingRow(
                temperature=float(params.temperature),
                top_k=min(max(0, params.top_k), self._vocab_size),
                top_p=float(params.top_p),
                min_p=float(params.min_p),
                seed=seed,
                sample_index=index,
                presence_penalty=float(params.presence_penalty),
                frequency_penalty=float(params.frequency_penalty),
                repetition_penalty=float(params.repetition_penalty),
                logit_bias=logit_bias,
                bad_words=bad_words,
                min_tokens=min(params.min_tokens, max_tokens),
                stop_token_ids=tuple(sorted(stop_token_ids)) if params.min_tokens > 0 else (),
                logprobs=answer_logprobs if params.watches_logprobs else None,
                # The prompt is the same for all.
                prompt_logprobs=params.prompt_logprobs if index == 0 else None,
                processors=name if params.logits_processors else "",
            )
            for index in range(params.best_of)
        )

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """The token sequences of each bad word, as the beginning of a text and after a space."""
        found: set[tuple[int, ...]] = set()
        for text in params.bad_words or ():
            word = text.lstrip(" ") or text
            for variant in (word, f" {word}"):
                found.add(tuple(self._tokenizer.encode(variant, add_special_tokens=False)))
            if () in found:
                raise ValueError(f"bad_words holds {text!r}, of which the tokenizer makes no tokens")
        # One that ends with another is barred by it.
        needed = [word for word in found if not any(word[start:] in found for start in range(1, len(word)))]
        return tuple(sorted(needed))

    def _next_seed(self) -> int:
        """A seed for a request that names none: the same run of the same engine draws the same."""
        digest = hashlib.blake2b(f"{self._seed} {next(self._numbers)}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


def _spaces_special_tokens(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a fast tokenizer's decoder, which alone decides it, puts spaces between special tokens."""
    special = [token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special][:1]
    together: str = tokenizer.backend_tokenizer.decode(special * 2, skip_special_tokens=False)
    alone: str = tokenizer.backend_tokenizer.decode(special, skip_special_tokens=False)
    return together != alone * 2
