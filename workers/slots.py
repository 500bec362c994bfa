"""What a rank keeps of each running sequence between steps: its slot."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from dist_vlm.kernels.upload import upload
from dist_vlm.workers.plan import ImageSpan, NewSequence, SamplingRow, Slice


@dataclass(slots=True)
class Sequence:
    """The part of `NewSequence` that stays on the host.

    failed: an image it needed could not be encoded; nothing more of it is computed.
    """

    num_prompt_tokens: int
    images: tuple[ImageSpan, ...]
    sampling: SamplingRow
    failed: bool = False


class SlotTable:
    """Tokens and block tables of all slots.

    token_ids: int64 [num_slots, max_model_len] on the device, where sampled tokens are written without a
        round trip to the host.
    block_ids: int64 [num_slots, blocks of max_model_len] on the host: the driver decides them.
    """

    def __init__(self, *, num_slots: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.token_ids = torch.zeros((num_slots, max_model_len), dtype=torch.int64, device=device)
        self.block_ids = np.zeros((num_slots, -(-max_model_len // block_size)), dtype=np.int64)
        self._num_blocks = [0] * num_slots
        self._sequences: list[Sequence | None] = [None] * num_slots

    def take(self, new: NewSequence) -> None:
        """Fills a free slot."""
        if self._sequences[new.slot] is not None:
            raise RuntimeError(f"slot {new.slot} is taken")
        tokens = torch.tensor(new.token_ids, dtype=torch.int64)
        self.token_ids[new.slot, : len(new.token_ids)] = tokens.to(self.token_ids.device, non_blocking=True)
        self._sequences[new.slot] = Sequence(new.num_prompt_tokens, new.images, new.sampling)
        self._num_blocks[new.slot] = 0

    def release(self, slot: int) -> None:
        if self._sequences[slot] is None:
            raise RuntimeError(f"slot {slot} is free already")
        self._sequences[slot] = None

    def sequence(self, slot: int) -> Sequence:
        sequence = self._sequences[slot]
        if sequence is None:
            raise RuntimeError(f"slot {slot} is free")
        return sequence

    def append_blocks(self, piece: Slice) -> None:
        """Extends a slot's block table by a slice's blocks."""
        self.sequence(piece.slot)
        begin = self._num_blocks[piece.slot]
        end = begin + len(piece.block_ids)
        self.block_ids[piece.slot, begin:end] = piece.block_ids
        self._num_blocks[piece.slot] = end
        if end * self.block_size < piece.start + piece.count:
            raise RuntimeError(f"slot {piece.slot}: {end} blocks do not cover {piece.start + piece.count} positions")

    def write_sampled(self, slots: Seq[int], positions: Seq[int], tokens: torch.Tensor) -> None:
        """Writes each slot's sampled token, int64 [R], at its position. One past the longest sequence has no place."""
        fits = [index for index, position in enumerate(positions) if position < self.token_ids.shape[1]]
        if len(fits) < len(slots):
            tokens = tokens[upload(fits, torch.int64, tokens.device)]
        where = upload([(slots[i], positions[i]) for i in fits], torch.int64, tokens.device).view(-1, 2)
        self.token_ids.index_put_((where[:, 0], where[:, 1]), tokens)
