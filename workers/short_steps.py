"""Steps of few tokens, recorded by their size: a GPU would finish them sooner than the host has launched them.

A recording computes `size` tokens of at most `MAX_SLICES` slices, a tile or more of each. What a step does not fill
belongs to a slot of its own: tokens that are written nowhere, tiles without rows, samples that nobody reads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dist_vlm.kernels.choice import RecordedOps
from dist_vlm.kernels.upload import refill
from dist_vlm.workers.batch import Batch
from dist_vlm.workers.comm import Communicator
from dist_vlm.workers.computed import NOT_FINITE, SLOT_FAILURES, UNPACKABLE
from dist_vlm.workers.decode import Decoded
from dist_vlm.workers.graph import Recording
from dist_vlm.workers.kv_cache import KVCache
from dist_vlm.workers.models.family import LanguageModel
from dist_vlm.workers.pack import Layout
from dist_vlm.workers.plan import Slice
from dist_vlm.workers.slots import SlotTable

_log = logging.getLogger(__name__)

MAX_TOKENS = 1024
MAX_SLICES = 16
_SIZE_STEP = 32


@dataclass(frozen=True, slots=True)
class _Held:
    """What a recording reads.

    tokens: int64 [5, size]: slot, position, rotary length, place in the cache, row of the features or -1.
    tiles: int32 [tiles, 4], see `RecordedOps.cut_tiles`.
    samples: int64 [4, MAX_SLICES]: of each slice the row that tells its next token, slot and position of this token,
        and whether the slice could not be laid out.
    features: [size, hidden_size].
    """

    tokens: Tensor
    tiles: Tensor
    samples: Tensor
    features: Tensor


class ShortSteps:
    """Needs slots that keep their block tables on the device."""

    def __init__(
        self,
        language: LanguageModel,
        *,
        ops: RecordedOps,
        slots: SlotTable,
        kv_cache: KVCache,
        comm: Communicator,
        vocab_size: int,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        self._language = language
        self._ops = ops
        self._slots = slots
        self._kv_cache = kv_cache
        self._comm = comm
        self._device = slots.token_ids.device
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        self._logits = torch.empty((MAX_SLICES, vocab_size), dtype=torch.float32, device=self._device)
        self._recordings: dict[int, tuple[_Held, Recording[Tensor]]] = {}

    def fits(self, slices: Sequence[Slice]) -> bool:
        num_tokens = sum(piece.count for piece in slices)
        return len(slices) <= MAX_SLICES and num_tokens < MAX_TOKENS

    def launch(self, slices: Sequence[Slice], layout: Layout) -> Decoded:
        """Enqueues a step that fits. Row i of what it computes is that of slice i, and means nothing unless that slice
        samples."""
        held, recording = self._recording(sum(piece.count for piece in slices))
        self._fill(held, slices, layout)
        return Decoded(self._logits[: len(slices)], recording.replay())

    def record(self, counts: Iterable[int]) -> None:
        """Records ahead what steps of so many tokens need."""
        for count in counts:
            self._recording(count)

    def _recording(self, num_tokens: int) -> tuple[_Held, Recording[Tensor]]:
        size = -(-(num_tokens + 1) // _SIZE_STEP) * _SIZE_STEP  # the last row is always one of no slot
        if size not in self._recordings:
            self._recordings[size] = self._make(size)
        return self._recordings[size]

    def _make(self, size: int) -> tuple[_Held, Recording[Tensor]]:
        began = time.perf_counter()

        def idle(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        held = _Held(
            tokens=idle(5, size),
            tiles=idle(size // _SIZE_STEP + MAX_SLICES, 4, dtype=torch.int32),
            samples=idle(4, MAX_SLICES),
            features=idle(size, self._hidden_size, dtype=self._dtype),
        )
        refill(held.tokens, self._idle_tokens(size))
        refill(held.samples, self._idle_samples(size))
        work = partial(self._step, held)
        recording = Recording(work, device=self._device, pool=self._pool, count=self._comm.count)
        _log.info("recorded a step of %d tokens in %.2f s", size, time.perf_counter() - began)
        return held, recording

    def _idle_tokens(self, size: int) -> np.ndarray:
        column = np.array([self._slots.idle_slot, 0, 1, -1, -1], dtype=np.int64)
        return np.repeat(column[:, None], size, axis=1)

    def _idle_samples(self, size: int) -> np.ndarray:
        column = np.array([size - 1, self._slots.idle_slot, 0, 0], dtype=np.int64)
        return np.repeat(column[:, None], MAX_SLICES, axis=1)

    def _fill(self, held: _Held, slices: Sequence[Slice], layout: Layout) -> None:
        size, num_tokens = held.tokens.shape[1], layout.slots.shape[0]
        tokens, samples = self._idle_tokens(size), self._idle_samples(size)
        tokens[:4, :num_tokens] = layout.slots, layout.positions, layout.rotary_lengths, layout.slot_mapping
        if layout.feature_rows is not None:
            tokens[4, :num_tokens] = layout.feature_rows
        pieces = []
        for index, (piece, (start, end, context)) in enumerate(zip(slices, layout.bounds, strict=True)):
            pieces.append((start, end, context, piece.slot))
            if piece.sample:
                samples[:3, index] = end - 1, piece.slot, context
            samples[3, index] = piece.slot in layout.unpackable
        tiles = np.zeros(held.tiles.shape, dtype=np.int32)
        cut = self._ops.cut_tiles(pieces)
        tiles[: len(cut)] = cut
        for target, values in ((held.tokens, tokens), (held.tiles, tiles), (held.samples, samples)):
            refill(target, values)
        if layout.image_features:
            num_rows = sum(part.shape[0] for part in layout.image_features)
            torch.cat(layout.image_features, out=held.features[:num_rows])

    def _step(self, held: _Held) -> Tensor:
        """int64 [1 + failures, MAX_SLICES]: the likeliest tokens, and the status."""
        slots, positions, lengths, mapping, feature_rows = held.tokens
        rows, sampled_slots, sampled_positions, unpackable = held.samples
        none = slots[:0]
        batch = Batch(
            token_ids=self._slots.all_token_ids[slots, positions],
            positions=positions.unsqueeze(0),
            rotary_lengths=lengths,
            slot_mapping=mapping,
            query_starts=none,
            context_lens=none,
            block_tables=self._slots.block_tables,
            logits_rows=rows,
            feature_rows=feature_rows,
            image_features=held.features,
            bounds=None,
            tiles=held.tiles,
        )
        hidden = self._language.forward(batch, self._kv_cache)
        logits = self._language.logits(hidden, out=self._logits)
        likeliest, finite = self._ops.greedy(logits)
        self._slots.all_token_ids[sampled_slots, sampled_positions] = likeliest
        table = torch.zeros((1 + len(SLOT_FAILURES), MAX_SLICES), dtype=torch.int64, device=self._device)
        table[0] = likeliest
        table[1 + UNPACKABLE] = unpackable
        table[1 + NOT_FINITE] = ~finite & (sampled_slots != self._slots.idle_slot)
        if self._comm.world_size > 1:
            table[1:] = self._comm.all_reduce(table[1:].float())
        return table
