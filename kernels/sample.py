"""Choice of the next token from logits.

What a request asks for is applied to its own row of logits alone, in this order:

1. logits processors, the caller's functions, each on what the one before it returned;
2. logit bias (`kernels/logit_bias.py`);
3. masks: stop tokens before min_tokens, then bad words (`kernels/logit_masks.py`);
4. penalties: repetition, then presence and frequency (`kernels/penalties.py`);
5. greedy: the highest logit, the lowest token id among equals. Otherwise, with x = (logit - highest) / temperature,
   a. top_k: the k highest, and all that equal the lowest of them;
   b. top_p: the smallest set of the likeliest of these whose mass reaches p of theirs (`kernels/top_p.py`);
   c. min_p: those at least p times as likely as the likeliest;
   d. a draw by the Gumbel-max rule: the argmax of

        x_v - log(-log(u_v)),  u_v uniform, counter-based by (seed, sample index, position, v)

      which is v with probability softmax(x)_v (Gumbel 1954; Maddison et al., "A* Sampling", 2014).

The noise depends on nothing but the request and the position, and every step is either elementwise or exact, so a
token depends on nothing of the batch. What decides here is host values: the device is never waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dist_vlm.kernels.philox import uniform_noise
from dist_vlm.kernels.top_p import cut_top_p
from dist_vlm.kernels.upload import upload

# Logits drawn from at once. On a CPU the temporaries of a part stay in its cache.
_PART_LOGITS = {"cpu": 2**18}
_PART_LOGITS_ELSEWHERE = 2**22
# Most that is held beside each of them.
_PART_BYTES_PER_LOGIT = 48
_FLOAT = torch.finfo(torch.float32)


class DrawRow(NamedTuple):
    """How one row is drawn.

    temperature: above 0. top_k: 0 for all. top_p: in (0, 1]. min_p: in [0, 1].
    seed: 0 .. 2**63 - 1. sample_index, position: below 2**32.
    """

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    sample_index: int = 0
    position: int = 0


def greedy(logits: Tensor) -> Tensor:
    """[rows, vocab] -> int64 [rows]. A row with NaN has no highest logit; its token is some id of the vocabulary."""
    vocab = logits.shape[-1]
    best = logits.amax(dim=-1, keepdim=True)
    ids = torch.arange(vocab, dtype=torch.int32, device=logits.device)
    return torch.where(logits == best, ids, vocab - 1).amin(dim=-1).to(torch.int64)


def draw_bytes(num_rows: int, vocab: int) -> int:
    """Upper bound of what `draw` allocates, in bytes; `draw_triton` allocates some 64 a row."""
    return _PART_BYTES_PER_LOGIT * min(num_rows * vocab, max(_PART_LOGITS_ELSEWHERE, vocab))


def draw(logits: Tensor, rows: Sequence[DrawRow]) -> Tensor:
    """Draws one token a row.

    logits: float32 [R, vocab], finite or -inf, with a finite one in each row. rows: R of them. Returns int64 [R].
    """
    size = max(1, _PART_LOGITS.get(logits.device.type, _PART_LOGITS_ELSEWHERE) // logits.shape[-1])
    parts = [_draw_part(part, rows[i * size : (i + 1) * size]) for i, part in enumerate(logits.split(size))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _draw_part(logits: Tensor, rows: Sequence[DrawRow]) -> Tensor:
    # Within float32, so that the quotient is never 0/0 or inf/inf.
    temperatures = [min(max(row.temperature, _FLOAT.tiny), _FLOAT.max) for row in rows]
    keys = [[row.seed for row in rows], [row.sample_index for row in rows], [row.position for row in rows]]
    temperature = upload(temperatures, torch.float32, logits.device)
    seed, sample_index, position = upload(keys, torch.int64, logits.device)
    scaled = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature.unsqueeze(1))
    scaled = _cut(scaled, rows)
    noise = uniform_noise(seed, sample_index, position, logits.shape[-1])
    return greedy(scaled.sub_(noise.log_().neg_().log_()))


def _cut(logits: Tensor, rows: Sequence[DrawRow]) -> Tensor:
    """Each cut, made on the rows that ask for it. May overwrite `logits`."""
    vocab = logits.shape[-1]
    top_k = {index: row.top_k for index, row in enumerate(rows) if 0 < row.top_k < vocab}
    top_p = {index: row.top_p for index, row in enumerate(rows) if row.top_p < 1}
    min_p = {index: row.min_p for index, row in enumerate(rows) if row.min_p > 0}
    logits = _on_rows(partial(cut_top_k, most=max(top_k.values(), default=0)), logits, top_k, torch.int64)
    logits = _on_rows(cut_top_p, logits, top_p, torch.float64)
    return _on_rows(cut_min_p, logits, min_p, torch.float32)


def _on_rows(
    cut: Callable[[Tensor, Tensor], Tensor], logits: Tensor, settings: Mapping[int, float], dtype: torch.dtype
) -> Tensor:
    if not settings:
        return logits
    values = upload(list(settings.values()), dtype, logits.device)
    if len(settings) == logits.shape[0]:
        return cut(logits, values)
    index = upload(list(settings), torch.int64, logits.device)
    return logits.index_copy_(0, index, cut(logits[index], values))


def cut_top_k(logits: Tensor, top_k: Tensor, *, most: int) -> Tensor:
    """-inf for all below the k-th highest of a row. top_k: int64 [rows], each in 1 .. most; most <= vocab."""
    highest = logits.topk(most, dim=-1).values
    threshold = highest.gather(1, (top_k - 1).unsqueeze(1))
    return logits.masked_fill(logits < threshold, -torch.inf)


def cut_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """-inf for all less than min_p times as likely as the row's likeliest. min_p: float32 [rows], in [0, 1]."""
    relative = (logits - logits.amax(dim=-1, keepdim=True)).exp_()
    return logits.masked_fill(relative < min_p.unsqueeze(1), -torch.inf)
