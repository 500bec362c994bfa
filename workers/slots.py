"""What a rank keeps of each running sequence between steps: its slot."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from dist_vlm.kernels.upload import upload
from dist_vlm.workers.plan import ImageSpan, NewSequence, SamplingRow, Slice
from dist_vlm.workers.sampler import is_greedy


@dataclass(slots=True)
class Sequence:
    """The part of `NewSequence` that stays on the host.

    images_end: the first position behind all images.
    is_greedy: see `dist_vlm.workers.sampler.is_greedy`.
    failed: an image it needed has no features, for it could not be encoded; nothing more of it is computed.
    """

    num_prompt_tokens: int
    images: tuple[ImageSpan, ...]
    sampling: SamplingRow
    images_end: int
    is_greedy: bool
    failed: bool = False

    @classmethod
    def of(cls, new: NewSequence) -> Sequence:
        images_end = max((span.end for span in new.images), default=0)
        return cls(new.num_prompt_tokens, new.images, new.sampling, images_end, is_greedy(new.sampling))


class SlotTable:
    """Tokens and block tables of all slots.

    token_ids: int64 [num_slots, max_model_len] on the device, where sampled tokens are written without a
        round trip to the host.
    all_token_ids: the same with one slot and one position more: rows of no slot, and tokens past the longest
        sequence, have a place to be written to.
    block_ids: int64 [num_slots, blocks of max_model_len] on the host: the driver decides them.
    block_tables: the same on the device, int32, with one slot more; what was appended is there after
        `upload_blocks`.
    num_prompt_tokens: of the sequence that took each slot last.
    idle_slot: the one slot more, which no sequence takes.
    """

    def __init__(self, *, num_slots: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.idle_slot = num_slots
        self.all_token_ids = torch.zeros((num_slots + 1, max_model_len + 1), dtype=torch.int64, device=device)
        self.token_ids = self.all_token_ids[:num_slots, :max_model_len]
        self.block_ids = np.zeros((num_slots, -(-max_model_len // block_size)), dtype=np.int64)
        shape = (num_slots + 1, self.block_ids.shape[1])
        self.block_tables = torch.zeros(shape, dtype=torch.int32, device=device)
        # By place: a slot may be taken anew before its blocks go up, and of two writes to one place a GPU keeps either.
        self._appended: dict[tuple[int, int], int] = {}
        self.num_prompt_tokens = [0] * num_slots
        self._num_blocks = [0] * num_slots
        self._sequences: list[Sequence | None] = [None] * num_slots

    def take(self, new: NewSequence) -> None:
        """Fills a free slot."""
        if self._sequences[new.slot] is not None:
            raise RuntimeError(f"slot {new.slot} is taken")
        tokens = upload(new.token_ids, torch.int64, self.token_ids.device)
        self.token_ids[new.slot, : len(new.token_ids)] = tokens
        self._sequences[new.slot] = Sequence.of(new)
        self.num_prompt_tokens[new.slot] = new.num_prompt_tokens
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
        slot, start, count, block_ids, _ = piece
        self.sequence(slot)
        end = self._num_blocks[slot]
        if block_ids:
            begin, end = end, end + len(block_ids)
            self.block_ids[slot, begin:end] = block_ids
            self._num_blocks[slot] = end
            self._appended.update(((slot, begin + index), block) for index, block in enumerate(block_ids))
        if end * self.block_size < start + count:
            raise RuntimeError(f"slot {slot}: {end} blocks do not cover {start + count} positions")

    def write_sampled(self, slots: Seq[int], positions: Seq[int], tokens: torch.Tensor) -> None:
        """Writes each slot's sampled token, int64 [R], at its position."""
        where = upload([slots, positions], torch.int64, tokens.device)
        self.all_token_ids[where[0], where[1]] = tokens

    def upload_blocks(self) -> None:
        """Brings `block_tables` up to date."""
        if not self._appended:
            return
        rows = [(slot, place, block) for (slot, place), block in self._appended.items()]
        slots, places, blocks = upload(rows, torch.int64, self.block_tables.device).T
        self.block_tables[slots, places] = blocks.to(torch.int32)
        self._appended.clear()
