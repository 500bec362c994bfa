"""One rank's model, cache and slots: runs a plan. Knows no model family by name."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
import torch

from dist_vlm.kernels.choice import choose
from dist_vlm.workers.comm import Communicator
from dist_vlm.workers.config import LoadReport, RankConfig
from dist_vlm.workers.kv_cache import KVCache, block_bytes
from dist_vlm.workers.memory import kv_cache_bytes
from dist_vlm.workers.models import get_family, read_spec
from dist_vlm.workers.pack import pack
from dist_vlm.workers.peak_memory import PeakMemory
from dist_vlm.workers.plan import SampledTokens, Slice, SlotFailure, StepCounters, StepPlan, StepResult
from dist_vlm.workers.sampler import sample_tokens
from dist_vlm.workers.slots import SlotTable
from dist_vlm.workers.vision import FeatureStore, ImageStore
from dist_vlm.workers.weights import open_weights

_log = logging.getLogger(__name__)


class Runner:
    """`load`, `allocate`, then any number of `step`s; `stage` and `unstage` at any time, from any thread."""

    def __init__(self, config: RankConfig, comm: Communicator) -> None:
        self.config = config
        self.comm = comm
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.device = torch.device(config.device)
        self.spec = read_spec(config.model)
        self.family = get_family(self.spec.family)
        self.ops = choose(config.kernels, self.device)
        self.images = ImageStore()
        self.slots = SlotTable(
            num_slots=config.max_num_seqs,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
            device=self.device,
        )

    @staticmethod
    def preload(config: RankConfig) -> None:
        """Imports what loading the configured model needs."""
        get_family(read_spec(config.model).family).preload()

    @torch.inference_mode()
    def load(self) -> LoadReport:
        """Builds the shard and the vision encoder and fills them. Raises `CheckpointError` on a bad checkpoint."""
        self.preload(self.config)
        began, peak = time.perf_counter_ns(), PeakMemory(self.device)
        self.language = self.family.build_language(
            self.spec, comm=self.comm, ops=self.ops, dtype=self.dtype, device=self.device
        )
        self.vision = self.family.build_vision(self.spec, dtype=self.dtype, device=self.device)
        with open_weights(self.config, self.spec) as source:
            self.family.load_language(self.language, self.spec, source)
            self.family.load_vision(self.vision, self.spec, source)
        peak_bytes = peak.growth_bytes()
        self.features = FeatureStore(vision=self.vision, comm=self.comm, dtype=self.dtype, device=self.device)
        num_language, num_vision = _num_parameters(self.language.module), _num_parameters(self.vision.module)
        per_block = block_bytes(**self._cache_shape(), dtype=self.dtype)
        report = LoadReport(
            rank=self.config.rank,
            num_language_parameters=num_language,
            num_vision_parameters=num_vision,
            weight_bytes=(num_language + num_vision) * self.dtype.itemsize,
            peak_load_bytes=peak_bytes,
            kv_block_bytes=per_block,
            num_blocks=kv_cache_bytes(self.spec, self.config, self.dtype, self.ops.workspace_bytes) // per_block,
            kernels=self.ops.names,
            load_us=(time.perf_counter_ns() - began) // 1000,
        )
        _log.info("rank %d: %s", self.config.rank, report)
        return report

    def _cache_shape(self) -> dict[str, int]:
        return {
            "num_layers": self.spec.num_layers,
            "block_size": self.config.block_size,
            "num_kv_heads": max(1, self.spec.num_kv_heads // self.config.world_size),
            "head_dim": self.spec.head_dim,
        }

    def allocate(self, num_blocks: int) -> None:
        """Allocates the KV cache: the same number of blocks on every rank."""
        self.kv_cache = KVCache.allocate(
            num_blocks=num_blocks, dtype=self.dtype, device=self.device, **self._cache_shape()
        )
        self._no_features = torch.empty((0, self.spec.hidden_size), dtype=self.dtype, device=self.device)

    def stage(self, key: str, kind: str, array: np.ndarray) -> None:
        self.images.stage(key, kind, array)

    def unstage(self, key: str) -> None:
        self.images.unstage(key)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """Runs one plan; see `dist_vlm.workers.plan` for the order of its fields."""
        began, collectives = time.perf_counter_ns(), self.comm.count.total
        self._apply(plan)
        image_failures = self.features.encode(plan.encode, self.images)
        slices = [piece for piece in plan.slices if self._is_computable(piece)]
        sampled, slot_failures = self._compute(slices) if slices else ((), ())
        return StepResult(
            step_id=plan.step_id,
            rank=self.config.rank,
            sampled=sampled,
            image_failures=image_failures,
            slot_failures=slot_failures,
            counters=StepCounters(
                num_collectives=self.comm.count.total - collectives,
                num_encoded_images=len(plan.encode) - len(image_failures),
                busy_us=(time.perf_counter_ns() - began) // 1000,
            ),
        )

    def _apply(self, plan: StepPlan) -> None:
        for slot in plan.release:
            self.slots.release(slot)
        self.features.drop(plan.drop_features)
        self.kv_cache.copy_blocks(plan.copy_blocks)
        for new in plan.new:
            self.slots.take(new)
        for piece in plan.slices:
            self.slots.append_blocks(piece)

    def _is_computable(self, piece: Slice) -> bool:
        """Whether the images under a slice have features. A slot that once lacked one stays idle until it is
        released: the driver may have sent more of it before it learnt of the failure."""
        sequence = self.slots.sequence(piece.slot)
        if not sequence.failed:
            end = piece.start + piece.count
            sequence.failed = any(
                span.image not in self.features.features
                for span in sequence.images
                if span.start < end and span.end > piece.start
            )
        return not sequence.failed

    def _compute(self, slices: Sequence[Slice]) -> tuple[tuple[SampledTokens, ...], tuple[SlotFailure, ...]]:
        """Samples where slices ask for it; a slot whose logits are not finite fails alone."""
        batch = pack(slices, slots=self.slots, features=self.features.features, empty_features=self._no_features)
        logits = self.language.forward(batch, self.kv_cache)
        sampling = [piece for piece in slices if piece.sample]
        if not sampling:
            return (), ()
        positions = [piece.start + piece.count for piece in sampling]
        rows = [self.slots.sequence(piece.slot).sampling for piece in sampling]
        tokens = sample_tokens(logits, rows, positions)
        slot_ids = torch.tensor([piece.slot for piece in sampling], device=self.device)
        self.slots.write_sampled(slot_ids, torch.tensor(positions, device=self.device), tokens)
        finite = torch.isfinite(logits).all(dim=-1).tolist()
        sampled, failures = [], []
        for piece, token, is_finite in zip(sampling, tokens.tolist(), finite, strict=True):
            if is_finite:
                sampled.append(SampledTokens(piece.slot, (token,)))
            else:
                self.slots.sequence(piece.slot).failed = True
                failures.append(SlotFailure(piece.slot, "the model's logits are not finite numbers"))
        return tuple(sampled), tuple(failures)


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
