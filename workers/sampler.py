"""Sampling of a step's new tokens, the same on every rank: all hold the same gathered logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_vlm.kernels import sample
from dist_vlm.kernels.logprobs import LogprobTensors, compute_logprobs
from dist_vlm.kernels.upload import upload
from dist_vlm.workers.logit_edits import LogitsProcessor, Penalise, SampleRow, asks_edits, edit_logits
from dist_vlm.workers.plan import SamplingRow, TokenLogprobs

__all__ = [
    "LogitsProcessor",
    "PendingLogprobs",
    "SampleRow",
    "is_greedy",
    "sample_tokens",
    "sampling_bytes",
    "token_logprobs",
]


def sampling_bytes(num_rows: int, vocab: int, max_model_len: int) -> int:
    """Upper bound of what `sample_tokens` allocates beside the logits, in bytes; `token_logprobs` stays below it.

    A copy of the logits that edits change, one of those drawn from and the counts of generated tokens, 4 bytes a
    logit each; five integers a known token for the penalties; and the draw itself.
    """
    return num_rows * (3 * 4 * vocab + 5 * 8 * max_model_len) + sample.draw_bytes(num_rows, vocab)


def is_greedy(sampling: SamplingRow) -> bool:
    """Whether the likeliest token is taken, as the logits are, and nothing more is told of it."""
    return sampling.temperature == 0 and sampling.logprobs is None and not asks_edits(sampling)


def sample_tokens(
    logits: Tensor,
    rows: Sequence[SampleRow],
    *,
    token_ids: Tensor,
    processors: Mapping[str, Sequence[LogitsProcessor]],
    draw: Callable[[Tensor, Sequence[sample.DrawRow]], Tensor],
    penalise: Penalise,
) -> Tensor:
    """Chooses a token for each row; the order in which its options apply: see `dist_vlm.kernels.sample`.

    logits: float32 [R, vocab], not modified. token_ids: int64 [num_slots, max_model_len]: the tokens of all slots,
    of which those below a row's position are known in its slot. processors: by the name that a row has.
    draw, penalise: the ops that draw and penalise (`OpSet`).
    Returns int64 [R], enqueued: the device is waited for only where a row has logits processors, or masks enough to
    leave no token. A row's token depends on no other row. Raises `ValueError` where one row asks what cannot be
    done, whatever the others are.
    """
    edits = {index: row for index, row in enumerate(rows) if asks_edits(row.sampling)}
    if edits:
        logits = edit_logits(logits, edits, token_ids=token_ids, processors=processors, penalise=penalise)
    drawn = {index: _draw_row(row) for index, row in enumerate(rows) if row.sampling.temperature > 0}
    if drawn and len(drawn) == len(rows):
        return draw(logits, list(drawn.values()))
    tokens = sample.greedy(logits)
    if drawn:
        index = upload(list(drawn), torch.int64, logits.device)
        tokens.index_copy_(0, index, draw(logits[index], list(drawn.values())))
    return tokens


def _draw_row(row: SampleRow) -> sample.DrawRow:
    sampling = row.sampling
    return sample.DrawRow(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        sample_index=sampling.sample_index,
        position=row.position,
    )


@dataclass(frozen=True, slots=True)
class PendingLogprobs:
    """Log probabilities that may still be on their way from the device.

    num_top: how many of the likeliest tokens each row asked for.
    """

    tensors: LogprobTensors
    num_top: tuple[int, ...]

    def to_host(self) -> PendingLogprobs:
        """Enqueues the copy to the host; what is returned may be read once the device has come to here."""
        return PendingLogprobs(
            LogprobTensors(*(tensor.to("cpu", non_blocking=True) for tensor in self.tensors)), self.num_top
        )

    def read(self) -> list[TokenLogprobs]:
        """One entry a row."""
        columns = (tensor.tolist() for tensor in self.tensors)
        return [
            TokenLogprobs(logprob, rank, tuple(top_ids[:count]), tuple(top_logprobs[:count]))
            for count, logprob, rank, top_ids, top_logprobs in zip(self.num_top, *columns, strict=True)
        ]


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: Sequence[int]) -> PendingLogprobs:
    """Log probabilities of tokens under the model's own distribution, enqueued.

    logits: float32 [R, vocab], as the model gave them. token_ids: int64 [R], in the vocabulary. num_top: of R rows,
    how many of the likeliest tokens to report beside the row's own; at most the vocabulary's are.
    """
    tensors = compute_logprobs(logits, token_ids, num_top=max(num_top, default=0))
    return PendingLogprobs(tensors, tuple(num_top))
