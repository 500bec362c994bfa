"""Runners with one fault each, that ranks import by name: what a check of a checkpoint must find."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from dist_vlm.workers.batch import Batch
from dist_vlm.workers.comm import Communicator
from dist_vlm.workers.config import LoadReport, RankConfig
from dist_vlm.workers.kv_cache import KVCache
from dist_vlm.workers.rotary import RotaryFrequencies
from dist_vlm.workers.runner import Runner
from dist_vlm.workers.sampler import SampleRow


def runner_name(runner: type[Runner]) -> str:
    """As executors take it; this module lies on the ranks' path by itself."""
    return f"{__name__.rpartition('.')[2]}:{runner.__name__}"


class WrongTheta(Runner):
    """Rotary frequencies of another base: 20 000 for 10 000."""

    def load(self) -> LoadReport:
        report = super().load()
        language: Any = self.language
        head_dim = language.facts.head_dim
        config = dataclasses.replace(language.facts, rope_theta=2 * language.facts.rope_theta)
        language.rotary = RotaryFrequencies(config, head_dim=head_dim, dtype=self.dtype, device=self.device)
        return report


class OneAheadWhenDecoding(Runner):
    """Where a step computes one token of each sequence, it is taken to stand one place further on."""

    def load(self) -> LoadReport:
        report = super().load()
        language: Any = self.language
        right = language.forward

        def forward(batch: Batch, kv_cache: KVCache) -> torch.Tensor:
            bounds = batch.bounds or ()
            decodes = batch.decode_slots is not None or all(end - start == 1 for start, end, _ in bounds)
            ahead = 1 if decodes else 0
            return right(dataclasses.replace(batch, positions=batch.positions + ahead), kv_cache)

        language.forward = forward
        return report


class SecondLikeliest(Runner):
    """Right logits, and the wrong token taken."""

    def _sample_rows(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
        return logits.topk(2, dim=-1).indices[:, 1]


class SwappedShards(Runner):
    """In one layer the ranks hold each other's part of a matrix."""

    def load(self) -> LoadReport:
        report = super().load()
        language: Any = self.language
        with torch.inference_mode():
            weight = language.shard.layers[1].down.weight
            weight.copy_(self.comm.all_gather(weight)[1 - self.config.rank])
        return report


class ReversedGather(Communicator):
    """The ranks' parts, last rank first; the process group's, since the certificate would find others out."""

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return Communicator.all_gather(self, tensor).flip(0)


class BrokenGather(Runner):
    def __init__(self, config: RankConfig, comm: Communicator) -> None:
        super().__init__(config, ReversedGather(comm.rank, comm.world_size, comm.group, comm.count))


class GatherBrokenOnOneRank(Runner):
    """The ranks then have different logits."""

    def __init__(self, config: RankConfig, comm: Communicator) -> None:
        kind = ReversedGather if comm.rank == 1 else Communicator
        super().__init__(config, kind(comm.rank, comm.world_size, comm.group, comm.count))
