"""Training rows: one picture, several questions about it.

A row holds the prompt's common start (with the image tokens) once, and then one slot for each question with its
answer. A slot sees the start and itself, and its positions go on from the start as if it were alone; so every slot is
trained on exactly what it meets when it is asked alone, at a third of the cost of one row for each question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from tokenizers import Tokenizer

from examples.demo.questions import QA
from examples.demo.tokenizer import EOS, IMAGE, PAD, PREFIX, SUFFIX

IGNORE = -100  # a target the loss skips
SLOTS = (24, 24, 24, 24, 24, 24, 58)  # tokens; the last one is for the questions with long answers
NUM_SHORT = len(SLOTS) - 1
SHORT_WEIGHT = 4.0  # of a token in a short answer, to one in a long: else the few short ones hardly count
Tokens = np.ndarray  # int16 [sum(SLOTS)]


@dataclass(frozen=True)
class Packer:
    tokenizer: Tokenizer
    num_image_tokens: int

    def prefix(self) -> list[int]:
        """`<s>USER: `, the image tokens, a line end."""
        image = self.tokenizer.token_to_id(IMAGE)
        ids: list[int] = []
        for token in self.tokenizer.encode(PREFIX).ids:
            ids += [token] * (self.num_image_tokens if token == image else 1)
        return ids

    def pack(self, asked: Sequence[QA | None]) -> tuple[Tokens, Tokens]:
        """Tokens and targets of one row. `targets[i]` is what follows `tokens[i]`, IGNORE outside the answers."""
        if len(asked) != len(SLOTS):
            raise ValueError(f"asked: {len(asked)} questions, a row has {len(SLOTS)} slots")
        tokens = np.full(sum(SLOTS), self.tokenizer.token_to_id(PAD), dtype=np.int16)
        targets = np.full(sum(SLOTS), IGNORE, dtype=np.int16)
        start = 0
        for qa, length in zip(asked, SLOTS, strict=True):
            if qa is not None:
                self._fill(qa, tokens[start : start + length], targets[start : start + length])
            start += length
        return tokens, targets

    def _fill(self, qa: QA, tokens: Tokens, targets: Tokens) -> None:
        question = _encode(self.tokenizer, qa.question + SUFFIX)
        answer = _encode(self.tokenizer, qa.answer)
        used = len(question) + len(answer)
        if used > len(tokens):
            raise ValueError(f"question {qa.question!r} with its answer has {used} tokens, its slot {len(tokens)}")
        tokens[:used] = question + answer
        targets[len(question) - 1 : used] = answer + (self.tokenizer.token_to_id(EOS),)


@lru_cache(maxsize=65536)
def _encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False).ids)


def target_weights() -> torch.Tensor:
    """float32 [1, tokens of the slots], what the loss at each place counts."""
    weights = (SHORT_WEIGHT,) * NUM_SHORT + (1.0,)
    return torch.cat([torch.full((n,), weight) for n, weight in zip(SLOTS, weights, strict=True)])[None]


def position_ids(num_prefix: int) -> torch.Tensor:
    """int64 [1, tokens of a row]."""
    parts = [torch.arange(num_prefix), *(num_prefix + torch.arange(length) for length in SLOTS)]
    return torch.cat(parts)[None]


def attention_mask(num_prefix: int) -> torch.Tensor:
    """bool [1, 1, tokens, tokens], True where the row (query) sees the column (key)."""
    owner = torch.cat([torch.full((n,), i) for i, n in enumerate((num_prefix, *SLOTS))])
    causal = torch.ones(len(owner), len(owner)).tril().bool()
    same = (owner[:, None] == owner[None, :]) | (owner[None, :] == 0)
    return (causal & same)[None, None]
