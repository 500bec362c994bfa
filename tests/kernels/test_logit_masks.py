from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import NoBadWordsLogitsProcessor

from dist_vlm.kernels.logit_masks import mask_completions, mask_tokens

VOCAB = 9


def complete(logits: torch.Tensor, token_ids: torch.Tensor, words: list[tuple[int, int, int, list[int]]]) -> None:
    """Calls the op for (row, slot, end, word) tuples; a word's padding is a token that would match."""
    longest = max(len(word) for *_, word in words)
    rows, slots, ends = (torch.tensor(column) for column in list(zip(*words, strict=True))[:3])
    mask_completions(
        logits,
        token_ids,
        rows=rows,
        slots=slots,
        ends=ends,
        words=torch.tensor([word + [1] * (longest - len(word)) for *_, word in words]),
        lengths=torch.tensor([len(word) for *_, word in words]),
    )


def test_pairs_are_masked_and_nothing_else() -> None:
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    mask_tokens(logits, rows=torch.tensor([1, 1, 1]), ids=torch.tensor([0, 8, 8]))
    assert logits[1].isinf().nonzero().flatten().tolist() == [0, 8]
    assert torch.equal(logits[0], before[0])
    assert torch.equal(logits[1, 1:8], before[1, 1:8])


def test_words_are_banned_as_transformers_bans_them() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        length = int(torch.randint(4, 7, (1,), generator=generator))
        tokens = torch.randint(0, 2, (1, length), generator=generator)
        logits = torch.randn(1, VOCAB, generator=generator)
        words = {
            tuple(torch.randint(0, 2, (size,), generator=generator).tolist())
            for size in torch.randint(2, 5, (6,), generator=generator).tolist()
        }
        expected = NoBadWordsLogitsProcessor([list(word) for word in words])(tokens, logits)
        held = torch.full((2, 8), 1)
        held[1, :length] = tokens
        complete(logits, held, [(0, 1, length, list(word)) for word in words])
        assert torch.equal(logits, expected)


def test_a_word_may_begin_where_the_sequence_does() -> None:
    logits = torch.zeros(1, VOCAB)
    complete(logits, torch.tensor([[3, 4, 0]]), [(0, 0, 2, [3, 4, 5]), (0, 0, 2, [4, 4, 6])])
    assert logits.isinf().nonzero().tolist() == [[0, 5]]


def test_each_word_looks_at_its_own_slot_and_end() -> None:
    held = torch.tensor([[3, 4, 5, 6], [5, 6, 3, 4]])
    logits = torch.zeros(3, VOCAB)
    complete(logits, held, [(0, 0, 4, [5, 6, 7]), (1, 1, 4, [5, 6, 7]), (2, 1, 2, [5, 6, 8]), (2, 1, 2, [6, 8])])
    assert logits.isinf().nonzero().tolist() == [[0, 7], [2, 8]]


def test_wrong_arguments_are_refused() -> None:
    one = torch.ones(1, dtype=torch.int64)
    arguments = {"rows": one, "slots": one, "ends": one, "lengths": one}
    with pytest.raises(ValueError, match=r"mask_completions: words has shape \[2, 2\], must be \[1, any\]"):
        mask_completions(torch.zeros(2, 3), torch.zeros(2, 4), words=torch.zeros(2, 2), **arguments)
    with pytest.raises(ValueError, match=r"mask_tokens: ids has shape \[2\], must be \[1\]"):
        mask_tokens(torch.zeros(2, 3), rows=one, ids=torch.ones(2, dtype=torch.int64))
