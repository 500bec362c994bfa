"""What rows ask to be done to their logits before a token is chosen, from host values to device operations.

The order is that of `kernels/sample.py`. Every function edits, in place, only the rows that ask.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_vlm.kernels.logit_bias import add_bias
from dist_vlm.kernels.logit_masks import mask_completions, mask_tokens
from dist_vlm.kernels.penalties import PenaltyRow
from dist_vlm.kernels.upload import upload
from dist_vlm.workers.failure import describe
from dist_vlm.workers.plan import SamplingRow

LogitsProcessor = Callable[[list[int], Tensor], Tensor]
Penalise = Callable[[Tensor, Tensor, Sequence[PenaltyRow]], None]

_FLOAT = torch.finfo(torch.float32)


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row to sample.

    position: where the new token will stand in its sequence, which is the number of tokens known.
    """

    sampling: SamplingRow
    slot: int
    position: int
    num_prompt_tokens: int

    @property
    def num_generated_tokens(self) -> int:
        return self.position - self.num_prompt_tokens

    @property
    def masked_stop_ids(self) -> tuple[int, ...]:
        """Tokens that would end the sequence too early."""
        return self.sampling.stop_token_ids if self.num_generated_tokens < self.sampling.min_tokens else ()


def asks_edits(sampling: SamplingRow) -> bool:
    """Whether anything but the draw is asked. Read once a row and step: plain rows cost this and no more."""
    return bool(
        sampling.repetition_penalty != 1
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.logit_bias
        or sampling.bad_words
        or sampling.min_tokens
        or sampling.processors
    )


def edit_logits(
    logits: Tensor,
    rows: Mapping[int, SampleRow],
    *,
    token_ids: Tensor,
    processors: Mapping[str, Sequence[LogitsProcessor]],
    penalise: Penalise,
) -> Tensor:
    """A copy of logits, float32 [R, vocab], in which each of `rows`, by its index, has what it asks.

    penalise: the op that penalises (`OpSet.penalise`).
    Waits for the device only where a row has logits processors, or could be left without any token.
    Raises `ValueError` naming the field where a row asks what cannot be done.
    """
    edited = logits.clone()
    for index, row in rows.items():
        if row.sampling.processors:
            edited[index] = _processed(edited[index], row, token_ids, processors)
    _add_biases(edited, rows)
    _mask_tokens(edited, rows)
    _mask_completions(edited, rows, token_ids)
    _penalise(edited, rows, token_ids, penalise)
    _check_choice(edited, rows)
    return edited


def _processed(
    logits: Tensor, row: SampleRow, token_ids: Tensor, processors: Mapping[str, Sequence[LogitsProcessor]]
) -> Tensor:
    """What the row's processors make of its logits, [vocab]."""
    name = row.sampling.processors
    if name not in processors:
        raise ValueError(f"processors = {name!r}: no functions were registered under this name")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the model's logits are not finite numbers")
    generated: list[int] = token_ids[row.slot, row.num_prompt_tokens : row.position].tolist()
    # A copy, so that what a function keeps does not keep the whole batch.
    current = logits.clone()
    for function in processors[name]:
        label = getattr(function, "__name__", type(function).__name__)
        try:
            result = function(list(generated), current)
        except Exception as error:
            raise ValueError(f"logits processor {label} raised {describe(error)}") from error
        current = _checked(label, result, logits)
    return current


def _checked(label: str, result: object, logits: Tensor) -> Tensor:
    """A processor's result, which may stand for `logits`."""
    wanted = f"must be a float32 tensor of shape {list(logits.shape)} on {logits.device}"
    if not isinstance(result, Tensor):
        raise ValueError(f"logits processor {label} returned {type(result).__name__}: {wanted}")
    if result.shape != logits.shape or result.dtype != logits.dtype or result.device != logits.device:
        got = f"a {result.dtype} tensor of shape {list(result.shape)} on {result.device}"
        raise ValueError(f"logits processor {label} returned {got}: {wanted}")
    highest = float(result.max())
    if highest == -torch.inf:
        raise ValueError(f"logits processor {label} left no token to choose: all its logits are -inf")
    if not highest < torch.inf:
        raise ValueError(f"logits processor {label} returned NaN or +inf: logits must be finite or -inf")
    return result


def _add_biases(logits: Tensor, rows: Mapping[int, SampleRow]) -> None:
    indices: list[int] = []
    ids: list[int] = []
    values: list[float] = []
    for index, row in rows.items():
        biases = _summed(row.sampling.logit_bias)
        _check_ids("logit_bias", biases, vocab=logits.shape[1])
        indices += [index] * len(biases)
        ids += biases
        values += biases.values()
    if ids:
        cells = upload([indices, ids], torch.int64, logits.device)
        bias = upload(values, torch.float64, logits.device).clamp_(_FLOAT.min, _FLOAT.max).to(torch.float32)
        add_bias(logits, rows=cells[0], ids=cells[1], bias=bias)


def _summed(pairs: Sequence[tuple[int, float]]) -> dict[int, float]:
    """Token id -> the sum of its biases."""
    biases = dict(pairs)
    if len(biases) < len(pairs):
        biases = dict.fromkeys(biases, 0.0)
        for token, bias in pairs:
            biases[token] += bias
    return biases


def _mask_tokens(logits: Tensor, rows: Mapping[int, SampleRow]) -> None:
    """Stop tokens before min_tokens and bad words of one token. A stop token past the vocabulary never comes."""
    vocab = logits.shape[1]
    indices: list[int] = []
    ids: list[int] = []
    for index, row in rows.items():
        masked = [token for token in row.masked_stop_ids if 0 <= token < vocab]
        for word in row.sampling.bad_words:
            if not word:
                raise ValueError("bad_words holds an empty sequence: must hold sequences of token ids")
            _check_ids("bad_words", word, vocab=vocab)
            if len(word) == 1:
                masked.append(word[0])
        indices += [index] * len(masked)
        ids += masked
    if ids:
        cells = upload([indices, ids], torch.int64, logits.device)
        mask_tokens(logits, rows=cells[0], ids=cells[1])


def _mask_completions(logits: Tensor, rows: Mapping[int, SampleRow], token_ids: Tensor) -> None:
    """Bad words of several tokens. One whose beginning is longer than the sequence cannot be completed."""
    words = [
        (index, row.slot, row.position, word)
        for index, row in rows.items()
        for word in row.sampling.bad_words
        if 1 < len(word) <= row.position + 1
    ]
    if not words:
        return
    longest = max(len(word) for *_, word in words)
    columns = [[*place, len(word), *word, *(0,) * (longest - len(word))] for *place, word in words]
    table = upload(columns, torch.int64, logits.device)
    mask_completions(
        logits,
        token_ids,
        rows=table[:, 0],
        slots=table[:, 1],
        ends=table[:, 2],
        lengths=table[:, 3],
        words=table[:, 4:],
    )


def _penalise(logits: Tensor, rows: Mapping[int, SampleRow], token_ids: Tensor, penalise: Penalise) -> None:
    asking = [
        PenaltyRow(
            index,
            row.slot,
            row.num_prompt_tokens,
            row.position,
            row.sampling.repetition_penalty,
            row.sampling.presence_penalty,
            row.sampling.frequency_penalty,
        )
        for index, row in rows.items()
    ]
    if asking := [row for row in asking if row.repetition != 1 or row.penalises_generated]:
        penalise(logits, token_ids, asking)


def _check_choice(logits: Tensor, rows: Mapping[int, SampleRow]) -> None:
    """Raises `ValueError` where masks leave a row no token. Looks at the device only where they could: a row whose
    logits came finite from the model keeps a token while it has fewer masks than tokens."""
    for index, row in rows.items():
        num_masks = len(row.sampling.bad_words) + len(row.masked_stop_ids)
        could_be_empty = num_masks >= logits.shape[1] or (num_masks > 0 and row.sampling.processors)
        if could_be_empty and not bool((logits[index] > -torch.inf).any()):
            asked = {
                "bad_words": row.sampling.bad_words,
                "min_tokens": row.masked_stop_ids,
                "logits processors": row.sampling.processors,
            }
            raise ValueError(
                " and ".join(name for name, value in asked.items() if value) + ": no token is left to choose"
            )


def _check_ids(field: str, ids: Collection[int], *, vocab: int) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocab:
        wrong = next(token for token in ids if not 0 <= token < vocab)
        raise ValueError(f"{field} holds token {wrong}: must be in 0 .. {vocab - 1}")
