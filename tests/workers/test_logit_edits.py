from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from dist_vlm.kernels.penalties import penalise
from dist_vlm.workers.logit_edits import LogitsProcessor, SampleRow, asks_edits, edit_logits
from dist_vlm.workers.plan import SamplingRow

VOCAB = 12


def held_tokens(num_slots: int = 4, length: int = 10) -> Tensor:
    return torch.randint(0, VOCAB, (num_slots, length), generator=torch.Generator().manual_seed(2))


def edit(
    logits: Tensor,
    sampling: SamplingRow,
    *,
    slot: int = 0,
    position: int = 8,
    num_prompt_tokens: int = 5,
    token_ids: Tensor | None = None,
    functions: Sequence[LogitsProcessor] = (),
) -> Tensor:
    row = SampleRow(sampling, slot, position, num_prompt_tokens)
    held = held_tokens() if token_ids is None else token_ids
    return edit_logits(logits, {0: row}, token_ids=held, processors={"mine": functions}, penalise=penalise)


def logits_row(seed: int = 0) -> Tensor:
    return torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingRow(repetition_penalty=1.1),
        SamplingRow(presence_penalty=-0.1),
        SamplingRow(frequency_penalty=0.1),
        SamplingRow(logit_bias=((1, 0.0),)),
        SamplingRow(bad_words=((1,),)),
        SamplingRow(min_tokens=1),
        SamplingRow(processors="mine"),
    ],
)
def test_each_edit_alone_is_asked(sampling: SamplingRow) -> None:
    assert asks_edits(sampling)


def test_what_only_concerns_the_draw_is_no_edit() -> None:
    assert not asks_edits(SamplingRow(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, seed=3, logprobs=5))
    assert not asks_edits(SamplingRow(stop_token_ids=(1, 2), prompt_logprobs=1))


def test_biases_of_one_token_add_up() -> None:
    logits = logits_row()
    edited = edit(logits, SamplingRow(logit_bias=((3, 2.0), (11, -1e300), (3, 0.5))))
    expected = logits.clone()
    expected[0, 3] += 2.5
    expected[0, 11] = torch.finfo(torch.float32).min
    assert torch.equal(edited, expected)


@pytest.mark.parametrize("position", [5, 6, 7, 8])
def test_min_tokens_masks_stop_tokens_as_transformers_does(position: int) -> None:
    logits, stops = logits_row(), (2, 7)
    tokens = held_tokens()[:1, :position]
    expected = MinNewTokensLengthLogitsProcessor(5, 2, list(stops))(tokens, logits)
    asked = SamplingRow(min_tokens=2, stop_token_ids=(*stops, VOCAB + 4))
    assert torch.equal(edit(logits, asked, position=position), expected)
    assert expected.isinf().any() == (position < 7)


@pytest.mark.parametrize("position", [3, 4, 9])
def test_bad_words_are_those_of_transformers(position: int) -> None:
    logits, tokens = logits_row(), held_tokens()
    latest = tokens[1, :position].tolist()
    words = [[4], [latest[-1], 6], [*latest[-2:], 8], [(latest[-1] + 1) % VOCAB, 10], [latest[-2], 11]]
    assert latest[-1] != latest[-2]
    expected = NoBadWordsLogitsProcessor(words)(tokens[1:2, :position], logits)
    asked = SamplingRow(bad_words=tuple(map(tuple, words)))
    edited = edit(logits, asked, slot=1, position=position, num_prompt_tokens=1)
    assert torch.equal(edited, expected)
    assert edited[0].isinf().nonzero().flatten().tolist() == [4, 6, 8]


def test_a_bad_word_as_long_as_what_is_known_and_one_token_more_is_met_and_a_longer_one_is_not() -> None:
    latest = held_tokens()[0, :3].tolist()
    asked = SamplingRow(bad_words=((*latest, 9), (1, *latest, 5), (*latest, *latest, 7)))
    edited = edit(logits_row(), asked, position=3, num_prompt_tokens=2)
    assert edited[0].isinf().nonzero().flatten().tolist() == [9]


def test_repetition_counts_the_prompt_and_presence_and_frequency_do_not() -> None:
    logits, tokens = logits_row(), torch.tensor([[1, 2, 3, 3, 4, 4, 5, 0, 0, 0]])
    asked = SamplingRow(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25)
    edited = edit(logits, asked, position=7, num_prompt_tokens=4, token_ids=tokens)
    expected = RepetitionPenaltyLogitsProcessor(1.5)(tokens[:, :7], logits)
    expected[0, 4] -= 0.5 + 2 * 0.25
    expected[0, 5] -= 0.5 + 0.25
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-6)
    at_first = edit(logits, replace(asked, repetition_penalty=1.0), position=4, num_prompt_tokens=4, token_ids=tokens)
    assert torch.equal(at_first, logits)


def test_the_least_repetition_penalty_leaves_numbers() -> None:
    logits, tokens = torch.tensor([[0.0, 2.0, -2.0, 1.0]]), torch.tensor([[0, 1, 2]])
    edited = edit(logits, SamplingRow(repetition_penalty=1e-300), position=3, num_prompt_tokens=1, token_ids=tokens)
    assert edited.isfinite().all()
    assert edited.argmax().item() == 1
    assert edited[0, 0] == 0
    assert edited[0, 3] == 1


def test_functions_see_generated_tokens_and_what_the_one_before_returned() -> None:
    logits, seen = logits_row(), []

    def double(generated: list[int], row: Tensor) -> Tensor:
        seen.append(list(generated))
        generated.clear()
        return row.mul_(2)

    def add_count(generated: list[int], row: Tensor) -> Tensor:
        return row + len(generated)

    tokens, before = held_tokens(), logits.clone()
    edited = edit(logits, SamplingRow(processors="mine"), slot=2, functions=[double, add_count])
    assert torch.equal(edited, before * 2 + 3)
    assert seen == [tokens[2, 5:8].tolist()]
    assert torch.equal(logits, before)


def test_what_a_function_keeps_is_its_own_row() -> None:
    logits, kept = torch.randn(50, VOCAB), []
    row = SampleRow(SamplingRow(processors="mine"), 0, 8, 5)

    def keep(generated: list[int], row: Tensor) -> Tensor:
        kept.append(row)
        return row

    edit_logits(logits, {7: row}, token_ids=held_tokens(), processors={"mine": [keep]}, penalise=penalise)
    assert torch.equal(kept[0], logits[7])
    assert kept[0].untyped_storage().nbytes() == VOCAB * 4


def test_the_order_is_functions_bias_masks_penalties() -> None:
    logits, tokens = logits_row(), torch.tensor([[1, 2, 3, 4]])
    asked = SamplingRow(
        repetition_penalty=2.0,
        presence_penalty=0.5,
        logit_bias=((1, 1.0), (3, 1.0), (4, 9.0)),
        bad_words=((4,),),
        min_tokens=3,
        stop_token_ids=(5,),
        processors="mine",
    )
    edited = edit(
        logits, asked, position=4, num_prompt_tokens=2, token_ids=tokens, functions=[lambda ids, row: row * 0 + 3]
    )
    expected = torch.full((1, VOCAB), 3.0)
    expected[0, 1] = (3 + 1) / 2
    expected[0, 2] = 3 / 2
    expected[0, 3] = (3 + 1) / 2 - 0.5
    expected[0, 4] = expected[0, 5] = -torch.inf
    assert torch.equal(edited, expected)


def test_rows_that_ask_nothing_of_an_edit_keep_their_bits() -> None:
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(6, VOCAB, generator=generator)
    asked = {
        1: SamplingRow(repetition_penalty=1.3),
        3: SamplingRow(bad_words=((0, 1), (2,))),
        4: SamplingRow(frequency_penalty=1.0, logit_bias=((1, 3.0),)),
    }
    rows = {index: SampleRow(sampling, index % 4, 9, 3) for index, sampling in asked.items()}
    edited = edit_logits(logits, rows, token_ids=held_tokens(), processors={}, penalise=penalise)
    for index in range(6):
        if index in rows:
            alone = edit_logits(
                logits[index : index + 1], {0: rows[index]}, token_ids=held_tokens(), processors={}, penalise=penalise
            )
            assert torch.equal(edited[index], alone[0])
        else:
            assert torch.equal(edited[index], logits[index])


def raises(generated: list[int], row: Tensor) -> Tensor:
    raise ZeroDivisionError("division by zero")


BAD_FUNCTIONS: list[tuple[Callable, str]] = [
    (raises, "logits processor raises raised ZeroDivisionError: division by zero"),
    (lambda ids, row: None, "returned NoneType: must be a float32 tensor of shape \\[12\\] on cpu"),
    (lambda ids, row: row[:5], "returned a torch.float32 tensor of shape \\[5\\] on cpu: must be"),
    (lambda ids, row: row.double(), "returned a torch.float64 tensor of shape \\[12\\] on cpu: must be"),
    (lambda ids, row: row * torch.nan, "returned NaN or \\+inf: logits must be finite or -inf"),
    (lambda ids, row: row.abs() / 0, "returned NaN or \\+inf: logits must be finite or -inf"),
    (lambda ids, row: row - torch.inf, "left no token to choose"),
]


@pytest.mark.parametrize(("function", "message"), BAD_FUNCTIONS)
def test_a_bad_function_is_named(function: LogitsProcessor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edit(logits_row(), SamplingRow(processors="mine"), functions=[function])


def test_an_unknown_name_and_logits_of_the_model_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="processors = 'yours': no functions were registered"):
        edit(logits_row(), SamplingRow(processors="yours"))
    with pytest.raises(ValueError, match="the model's logits are not finite numbers"):
        edit(logits_row() * torch.nan, SamplingRow(processors="mine"), functions=[lambda ids, row: row])


ALL = tuple((token,) for token in range(VOCAB))


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (SamplingRow(bad_words=ALL), "^bad_words: no token is left to choose"),
        (
            SamplingRow(bad_words=ALL[:-1], min_tokens=9, stop_token_ids=(VOCAB - 1,)),
            "^bad_words and min_tokens: no token is left to choose",
        ),
        (
            SamplingRow(bad_words=ALL[:1], processors="mine"),
            "^bad_words and logits processors: no token is left to choose",
        ),
        (SamplingRow(logit_bias=((VOCAB, 1.0),)), r"logit_bias holds token 12: must be in 0 \.\. 11"),
        (SamplingRow(bad_words=((1, -1),)), r"bad_words holds token -1: must be in 0 \.\. 11"),
        (SamplingRow(bad_words=((),)), "bad_words holds an empty sequence"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(sampling: SamplingRow, message: str) -> None:
    def only_first(generated: list[int], row: Tensor) -> Tensor:
        return torch.where(torch.arange(VOCAB) == 0, row, -torch.inf)

    with pytest.raises(ValueError, match=message):
        edit(logits_row(), sampling, functions=[only_first])


def test_one_token_left_is_enough() -> None:
    edited = edit(logits_row(), SamplingRow(bad_words=(*ALL[:-1], (0,), (1,))))
    assert edited.isfinite()[0].nonzero().flatten().tolist() == [VOCAB - 1]
