"""Steps in which each sequence computes one token and samples the next, recorded once for each batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dist_vlm.kernels.choice import RecordedOps
from dist_vlm.kernels.upload import refill
from dist_vlm.workers.batch import Batch
from dist_vlm.workers.comm import Communicator
from dist_vlm.workers.computed import NOT_FINITE, SLOT_FAILURES, Computed
from dist_vlm.workers.graph import Recording
from dist_vlm.workers.kv_cache import KVCache
from dist_vlm.workers.models.family import LanguageModel
from dist_vlm.workers.plan import Slice
from dist_vlm.workers.slots import SlotTable


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a step enqueued, in the order of its slices; the next step's launch overwrites it.

    logits: float32 [R, vocab]. The likeliest tokens are written to the slots already.
    table: int64 [1 + failures, rows], rows at least R: these tokens, and the status, see `Computed.status`.
    """

    logits: Tensor
    table: Tensor

    @property
    def status(self) -> Tensor:
        """int64 [R, failures]."""
        return self.table[1:, : self.logits.shape[0]].T

    def to_host(self, rows: Sequence[int]) -> Computed:
        """Enqueues the copy of all but the logits, as one. rows: those that are sampled."""
        host = self.table.to("cpu", non_blocking=True)[:, : self.logits.shape[0]]
        return Computed(host[0], host[1:].T, None, (), rows)


def recorded_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that are recorded; a step runs with the next one up, its further rows computed for nothing."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, max_num_seqs, 16)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


class Decoder:
    """Needs slots that keep their block tables on the device."""

    def __init__(
        self,
        language: LanguageModel,
        *,
        ops: RecordedOps,
        slots: SlotTable,
        kv_cache: KVCache,
        comm: Communicator,
        max_num_seqs: int,
        vocab_size: int,
    ) -> None:
        self._language = language
        self._ops = ops
        self._slots = slots
        self._kv_cache = kv_cache
        self._comm = comm
        device = slots.token_ids.device
        self._device = device
        self._sizes = recorded_sizes(max_num_seqs)
        # Rows: slot, position, length for the rotary frequencies. Those of no sequence have a slot of their own.
        self._idle = np.array([[slots.idle_slot], [-1], [1]], dtype=np.int64)
        self._inputs = {size: torch.from_numpy(self._idle).to(device).repeat(1, size) for size in self._sizes}
        self._logits = torch.empty((max_num_seqs, vocab_size), dtype=torch.float32, device=device)
        self._no_rows = torch.empty(0, dtype=torch.int64, device=device)
        self._recordings: dict[int, Recording[Tensor]] = {}

    def record(self) -> None:
        """Records all sizes, the greatest first: the others then share its memory."""
        pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        for size in reversed(self._sizes):
            work = partial(self._step, size)
            self._recordings[size] = Recording(work, device=self._device, pool=pool, count=self._comm.count)

    def launch(self, slices: Sequence[Slice]) -> Decoded:
        """Enqueues a step. slices: of one token each, all of them sampling."""
        num_rows = len(slices)
        size = next(size for size in self._sizes if size >= num_rows)
        inputs = np.repeat(self._idle, size, axis=1)
        num_prompt_tokens = self._slots.num_prompt_tokens
        inputs[:, :num_rows] = (
            [piece.slot for piece in slices],
            [piece.start for piece in slices],
            [max(num_prompt_tokens[piece.slot], piece.start + 1) for piece in slices],
        )
        refill(self._inputs[size], inputs)
        return Decoded(self._logits[:num_rows], self._recordings[size].replay())

    def _step(self, size: int) -> Tensor:
        """int64 [1 + failures, size]: the likeliest tokens, and the status."""
        slots, positions, lengths = self._inputs[size]
        tokens, mapping, contexts = self._ops.decode_inputs(
            slots, positions, self._slots.all_token_ids, self._slots.block_tables, block_size=self._slots.block_size
        )
        batch = Batch(
            token_ids=tokens,
            positions=positions.clamp(min=0).unsqueeze(0),
            rotary_lengths=lengths,
            slot_mapping=mapping,
            query_starts=self._no_rows,
            context_lens=contexts,
            block_tables=self._slots.block_tables,
            logits_rows=None,
            feature_rows=None,
            image_features=self._no_rows,
            bounds=None,
            decode_slots=slots,
        )
        hidden = self._language.forward(batch, self._kv_cache)
        logits = self._language.logits(hidden, out=self._logits[:size])
        likeliest, finite = self._ops.greedy(logits)
        self._slots.all_token_ids[slots, contexts] = likeliest
        out = torch.zeros((1 + len(SLOT_FAILURES), size), dtype=torch.int64, device=self._device)
        out[0] = likeliest
        out[1 + NOT_FINITE] = ~finite  # the same on all ranks, as the logits are
        return out
