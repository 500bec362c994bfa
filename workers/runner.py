"""One rank's model, cache and slots: runs a plan. Knows no model family by name."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
import torch

from dist_vlm.kernels.choice import choose
from dist_vlm.kernels.upload import upload
from dist_vlm.workers.batch import Batch
from dist_vlm.workers.certificate import Certificate
from dist_vlm.workers.comm import Communicator
from dist_vlm.workers.computed import NOT_FINITE, SLOT_FAILURES, UNPACKABLE, UNSAMPLED, Computed, LaunchedStep
from dist_vlm.workers.config import LoadReport, RankConfig
from dist_vlm.workers.decode import Decoded, Decoder
from dist_vlm.workers.free_memory import check_room
from dist_vlm.workers.halves import Beside, Halves, cut
from dist_vlm.workers.kv_cache import KVCache, block_bytes
from dist_vlm.workers.memory import arena_bytes, encoder_batch_images, kv_cache_bytes
from dist_vlm.workers.models import get_family, read_spec
from dist_vlm.workers.open_collectives import settle
from dist_vlm.workers.pack import Layout, PromptRows, lay_out, pack
from dist_vlm.workers.peak_memory import PeakMemory
from dist_vlm.workers.pending import FinishedStep, PendingStep
from dist_vlm.workers.plan import ImageFailure, Slice, StepCounters, StepPlan, StepResult
from dist_vlm.workers.recorded_vision import MAX_IMAGES, RecordedVision
from dist_vlm.workers.rehearsal import rehearse
from dist_vlm.workers.sampler import (
    LogitsProcessor,
    PendingLogprobs,
    SampleRow,
    sample_tokens,
    token_logprobs,
)
from dist_vlm.workers.short_steps import MAX_TOKENS, ShortSteps
from dist_vlm.workers.slots import SlotTable
from dist_vlm.workers.vision import FeatureStore, ImageStore, Verdict
from dist_vlm.workers.weights import open_weights

# Beside a picture: with each of them, up to 31 more are recorded.
_TEXT_TOKENS = (1, 33, 65, 97)

_log = logging.getLogger(__name__)


class Runner:
    """`load`, `allocate`, then any number of `launch`es; `stage` and `unstage` at any time, from any thread.

    processors: logits processors by the name that a sequence's `SamplingRow` has.
    """

    def __init__(self, config: RankConfig, comm: Communicator) -> None:
        self.config = config
        self.comm = comm
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.device = torch.device(config.device)
        self._encodes_later = self.device.type == "cuda"  # the host of a GPU is to be ahead of it
        self.spec = read_spec(config.model)
        self.family = get_family(self.spec.family)
        self.ops = choose(config.kernels, self.device)
        self.images = ImageStore()
        self.processors: dict[str, tuple[LogitsProcessor, ...]] = {}
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
        self._certify()
        began, peak = time.perf_counter_ns(), PeakMemory(self.device)
        self.language = self.family.build_language(
            self.spec, comm=self.comm, ops=self.ops, dtype=self.dtype, device=self.device
        )
        self.vision = self.family.build_vision(self.spec, ops=self.ops, dtype=self.dtype, device=self.device)
        self.language.expect_positions(self.config.max_model_len)
        with open_weights(self.config, self.spec) as source:
            self.family.load_language(self.language, self.spec, source)
            self.family.load_vision(self.vision, self.spec, source)
        peak_bytes = peak.growth_bytes()
        self._recorded_vision = None if self.ops.recorded is None else RecordedVision(self.vision, device=self.device)
        self.features = FeatureStore(
            vision=self._recorded_vision or self.vision,
            comm=self.comm,
            dtype=self.dtype,
            device=self.device,
            hidden_size=self.spec.hidden_size,
            batch_images=encoder_batch_images(self.spec, self.config, self.dtype),
            data_parallel=self.config.vision_data_parallel,
        )
        num_language, num_vision = _num_parameters(self.language.module), _num_parameters(self.vision.module)
        per_block = block_bytes(**self._cache_shape(), dtype=self.dtype)
        report = LoadReport(
            rank=self.config.rank,
            num_language_parameters=num_language,
            num_vision_parameters=num_vision,
            weight_bytes=(num_language + num_vision) * self.dtype.itemsize,
            peak_load_bytes=peak_bytes,
            kv_block_bytes=per_block,
            num_blocks=kv_cache_bytes(self.config, self._arena_bytes()) // per_block,
            kernels=self.ops.names | {"all_reduce": self.comm.name},
            load_us=(time.perf_counter_ns() - began) // 1000,
        )
        _log.info("rank %d: %s", self.config.rank, report)
        return report

    def _certify(self) -> None:
        """Lets go of collectives that do not add up. Raises `CollectiveError` where no others are wanted."""
        opened = self.comm.collectives
        if opened is None:
            return
        certificate = Certificate.of_launch(self.config, self.spec, self.comm, dtype=self.dtype, device=self.device)
        settle(self.config, self.comm, opened, certificate.fault())

    def _arena_bytes(self) -> int:
        workspace, is_recorded = self.ops.workspace_bytes, self.ops.recorded is not None
        return arena_bytes(self.spec, self.config, self.dtype, workspace, is_recorded=is_recorded)

    def _cache_shape(self) -> dict[str, int]:
        return {
            "num_layers": self.spec.num_layers,
            "block_size": self.config.block_size,
            "num_kv_heads": max(1, self.spec.num_kv_heads // self.config.world_size),
            "head_dim": self.spec.head_dim,
        }

    @torch.inference_mode()
    def allocate(self, num_blocks: int) -> None:
        """Allocates the KV cache, the same number of blocks on every rank, and records what steps repeat; on a GPU one
        step is rehearsed. Raises `MemoryError` on a GPU that has no room for them."""
        if self.device.type == "cuda":
            cache = num_blocks * block_bytes(**self._cache_shape(), dtype=self.dtype)
            check_room(cache, self._arena_bytes(), self.config)
        self.kv_cache = KVCache.allocate(
            num_blocks=num_blocks, dtype=self.dtype, device=self.device, **self._cache_shape()
        )
        self._beside = Beside(self.device)
        self._no_tokens = torch.empty(0, dtype=torch.int64, device=self.device)
        self._no_features = torch.empty((0, self.spec.hidden_size), dtype=self.dtype, device=self.device)
        self._record()
        if self.device.type == "cuda":
            self._record_ahead()
            if self.config.kernels != "reference":  # which takes minutes for a step
                rehearse(self)

    def _record(self) -> None:
        """Records decode steps now, and steps of few tokens as they come, where ops and collectives allow it."""
        self._decoder = self._short_steps = None
        if self.ops.recorded is None or not self.comm.is_recordable:
            return
        self._decoder = Decoder(
            self.language,
            ops=self.ops.recorded,
            slots=self.slots,
            kv_cache=self.kv_cache,
            comm=self.comm,
            max_num_seqs=self.config.max_num_seqs,
            vocab_size=self.spec.vocab_size,
        )
        self._decoder.record()
        self._short_steps = ShortSteps(
            self.language,
            ops=self.ops.recorded,
            slots=self.slots,
            kv_cache=self.kv_cache,
            comm=self.comm,
            vocab_size=self.spec.vocab_size,
            hidden_size=self.spec.hidden_size,
            dtype=self.dtype,
        )

    def _record_ahead(self) -> None:
        """Records what a request with one picture and a short text needs, so that the first has not to wait for it."""
        shape, rows = self.spec.image_input_shape, self.spec.image_feature_size
        if self._recorded_vision is not None and shape is not None:
            batch_images = encoder_batch_images(self.spec, self.config, self.dtype)
            counts = range(min(MAX_IMAGES, batch_images), 0, -1)
            self._recorded_vision.record(counts, shape=shape[1:], dtype=self.dtype)
        if self._short_steps is not None and rows is not None:
            most = min(MAX_TOKENS - 1, self.config.max_num_batched_tokens, self.config.max_model_len)
            sizes = [rows + text for text in _TEXT_TOKENS if rows + text <= most]
            self._short_steps.record(reversed(sizes))  # the greatest first: the others share its memory

    def stage(self, key: str, kind: str, array: np.ndarray) -> None:
        self.images.stage(key, kind, array)

    def unstage(self, key: str) -> None:
        self.images.unstage(key)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Starts one plan; see `dist_vlm.workers.plan` for the order of its fields. Its result may be waited for while
        later plans are launched: tokens stay on the device, where the next plan finds them."""
        began, collectives, encoded = time.perf_counter_ns(), self.comm.count.total, self.features.num_encoded
        self._apply(plan)
        image_failures, verdict = self._encode(plan)
        slices = [piece for piece in plan.slices if self._is_computable(piece)]
        computed = self._compute(slices) if slices else None
        counters = StepCounters(
            num_collectives=self.comm.count.total - collectives,
            num_encoded_images=self.features.num_encoded - encoded,
            busy_us=(time.perf_counter_ns() - began) // 1000,
        )
        result = StepResult(plan.step_id, self.config.rank, image_failures=image_failures, counters=counters)
        if computed is None and verdict is None:
            return FinishedStep(result)
        find = None if verdict is None else verdict.to_host().failures
        return LaunchedStep(result, computed, slices, device=self.device, find_image_failures=find)

    def _encode(self, plan: StepPlan) -> tuple[tuple[ImageFailure, ...], Verdict | None]:
        """What of a plan's images has failed, or what will tell."""
        if not self._encodes_later:
            return self.features.encode(plan.encode, self.images), None
        sequences = [self.slots.sequence(piece.slot) for piece in plan.slices] if plan.encode else []
        num_rows = {span.image: span.count for sequence in sequences for span in sequence.images}
        return (), self.features.encode_later(plan.encode, self.images, num_rows)

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
        released: the driver may have sent more of it before it learnt of the failure.

        Where ranks wait to agree on failed images, they have done so before this, and leave out the same slices; where
        they do not, all have something in place of a failed image's features, and leave out none. A slot that failed on
        one rank alone is computed on, since the others do not know yet."""
        sequence = self.slots.sequence(piece.slot)
        if not sequence.failed and piece.start < sequence.images_end:
            end = piece.start + piece.count
            sequence.failed = any(
                span.image not in self.features.features
                for span in sequence.images
                if span.start < end and span.end > piece.start
            )
        return not sequence.failed

    def _compute(self, slices: Sequence[Slice]) -> Computed:
        """Enqueues a step's forward and sampling. What goes wrong with one slot is told in its row of the status."""
        if self._decoder is not None and all(self._is_decode(piece) for piece in slices):
            self.slots.upload_blocks()
            return self._sample_recorded(self._decoder.launch(slices), slices)
        layout = self._lay_out(slices)
        halves = self._halves(layout, slices)
        fits = self._short_steps is not None and self._short_steps.fits(slices)
        if self._short_steps is not None and fits and not layout.prompt_rows and halves is None:
            self.slots.upload_blocks()
            return self._sample_recorded(self._short_steps.launch(slices, layout), slices)
        return self._compute_laid_out(layout, slices, halves)

    def _halves(self, layout: Layout, slices: Sequence[Slice]) -> Halves | None:
        """Where the step is to be cut. All ranks decide alike: they make the same sums."""
        least = self.config.halve_step_tokens
        if least is None or self.comm.world_size == 1 or layout.prompt_rows:
            return None
        return cut(slices, min_tokens=least)

    def _is_decode(self, piece: Slice) -> bool:
        return piece.count == 1 and piece.sample and self.slots.sequence(piece.slot).sampling.prompt_logprobs is None

    def _sample_recorded(self, decoded: Decoded, slices: Sequence[Slice]) -> Computed:
        """decoded: a row a slice."""
        sampling = [index for index, piece in enumerate(slices) if piece.sample]
        if all(self.slots.sequence(slices[index].slot).is_greedy for index in sampling):
            return decoded.to_host(sampling)
        rows = [self._sample_row(slices[index]) for index in sampling]
        logits = decoded.logits[upload(sampling, torch.int64, self.device)]
        tokens, unsampled = self._sample(logits, rows)
        self.slots.write_sampled([row.slot for row in rows], [row.position for row in rows], tokens)
        status = decoded.status.float()
        if self.comm.world_size > 1 or unsampled:
            failed = torch.zeros((len(slices), len(SLOT_FAILURES)))
            failed[[piece.slot in unsampled for piece in slices], UNSAMPLED] = 1
            status += self.comm.all_reduce(failed.to(self.device, non_blocking=True))
        return Computed(tokens, status, self._logprobs(logits, tokens, rows), []).to_host()

    def _compute_laid_out(self, layout: Layout, slices: Sequence[Slice], halves: Halves | None) -> Computed:
        if halves is None:
            hidden = self.language.forward(self._pack(layout, slices), self.kv_cache)
        else:
            first, second = (self._pack(self._lay_out(half), half) for half in halves)
            hidden = torch.cat(self.language.forward_in_halves(first, second, self.kv_cache, self._beside))
        rows = [self._sample_row(piece) for piece in slices if piece.sample]
        status = torch.zeros((len(slices), len(SLOT_FAILURES)))
        status[[piece.slot in layout.unpackable for piece in slices], UNPACKABLE] = 1
        tokens, logprobs = self._no_tokens, None
        if rows:
            logits = self.language.logits(hidden[: len(rows)])
            tokens, unsampled = self._sample(logits, rows)
            status[[piece.slot in unsampled for piece in slices], UNSAMPLED] = 1
            self.slots.write_sampled([row.slot for row in rows], [row.position for row in rows], tokens)
            logprobs = self._logprobs(logits, tokens, rows)
        status = status.to(self.device, non_blocking=True)
        if rows:
            sampling = upload([index for index, piece in enumerate(slices) if piece.sample], torch.int64, self.device)
            status[sampling, NOT_FINITE] = (~torch.isfinite(logits).all(dim=-1)).float()
        status = self.comm.all_reduce(status)
        prompt = self._prompt_logprobs(hidden[len(rows) :], layout.prompt_rows)
        return Computed(tokens, status, logprobs, prompt).to_host()

    def _lay_out(self, slices: Sequence[Slice]) -> Layout:
        return lay_out(slices, slots=self.slots, features=self.features.features, width=self.spec.hidden_size)

    def _pack(self, layout: Layout, slices: Sequence[Slice]) -> Batch:
        return pack(layout, slices, slots=self.slots, empty_features=self._no_features)

    def _sample_row(self, piece: Slice) -> SampleRow:
        sequence = self.slots.sequence(piece.slot)
        return SampleRow(sequence.sampling, piece.slot, piece.start + piece.count, sequence.num_prompt_tokens)

    def _sample(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> tuple[torch.Tensor, set[int]]:
        """Tokens int64 [R], and the slots of the rows that cannot be sampled; their tokens mean nothing."""
        try:
            return self._sample_rows(logits, rows), set()
        except Exception:
            _log.exception("a step could not be sampled; looking for the slot")
        tokens, unsampled = torch.zeros(len(rows), dtype=torch.int64, device=self.device), set()
        for index, row in enumerate(rows):
            try:
                tokens[index : index + 1] = self._sample_rows(logits[index : index + 1], [row])
            except Exception:
                _log.exception("slot %d cannot be sampled", row.slot)
                unsampled.add(row.slot)
        return tokens, unsampled

    def _sample_rows(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
        return sample_tokens(
            logits,
            rows,
            token_ids=self.slots.token_ids,
            processors=self.processors,
            draw=self.ops.draw,
            penalise=self.ops.penalise,
        )

    def _logprobs(
        self, logits: torch.Tensor, tokens: torch.Tensor, rows: Sequence[SampleRow]
    ) -> tuple[tuple[int, ...], PendingLogprobs] | None:
        """The slots that asked for log probabilities of what they sampled, and these, one a slot."""
        wanted = [index for index, row in enumerate(rows) if row.sampling.logprobs is not None]
        if not wanted:
            return None
        index = upload(wanted, torch.int64, self.device)
        num_top = [rows[i].sampling.logprobs or 0 for i in wanted]
        return tuple(rows[i].slot for i in wanted), token_logprobs(logits[index], tokens[index], num_top)

    def _prompt_logprobs(
        self, hidden: torch.Tensor, prompt_rows: Sequence[PromptRows]
    ) -> list[tuple[PromptRows, list[PendingLogprobs]]]:
        """In parts of as many rows as a step samples at most, which is what memory is set aside for."""
        found, first = [], 0
        for rows in prompt_rows:
            tokens = self.slots.token_ids[rows.slot, rows.start : rows.start + rows.count]
            parts = []
            for low in range(0, rows.count, self.config.max_num_seqs):
                high = min(low + self.config.max_num_seqs, rows.count)
                logits = self.language.logits(hidden[first + low : first + high])
                parts.append(token_logprobs(logits, tokens[low:high], [rows.num_top] * (high - low)))
            found.append((rows, parts))
            first += rows.count
        return found


def _num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
