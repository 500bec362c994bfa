"""python -m dist_vlm.workers.compile_ahead CONFIG: compiles what a rank will launch, before there is a rank.

CONFIG: the fields of a `RankConfig`, JSON. A rank's steps are made with tensors that have no memory; the kernels that
they would launch are compiled into Triton's cache on disk. Nothing depends on it: what a rank misses, it compiles.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from torch import Tensor

from dist_vlm.kernels.all_reduce.peer_buffers import MAX_RANKS, MIN_RANKS, PEER_CAPACITY, PeerBuffers
from dist_vlm.kernels.all_reduce.peer_collectives import PeerCollectives
from dist_vlm.kernels.all_reduce.rules import rules_for
from dist_vlm.kernels.choice import OpSet, RecordedOps, choose
from dist_vlm.kernels.compile_only import Launch, compile_driver, compile_for, gpu_capability, gpu_name, launches_told
from dist_vlm.kernels.few_rows_triton import ROW_SIZES
from dist_vlm.kernels.penalties import PenaltyRow
from dist_vlm.kernels.sample import DrawRow
from dist_vlm.workers.certificate import Certificate
from dist_vlm.workers.collectives import PeerPath
from dist_vlm.workers.comm import Communicator
from dist_vlm.workers.config import RankConfig
from dist_vlm.workers.decode import Decoder
from dist_vlm.workers.kv_cache import KVCache
from dist_vlm.workers.models import ModelFamily, ModelSpec, get_family, read_spec
from dist_vlm.workers.models.family import LanguageModel
from dist_vlm.workers.pack import lay_out, pack
from dist_vlm.workers.plan import NewSequence, SamplingRow, Slice
from dist_vlm.workers.recorded_vision import MAX_IMAGES
from dist_vlm.workers.runner import Runner
from dist_vlm.workers.short_steps import ShortSteps
from dist_vlm.workers.slots import SlotTable

_DEVICE = torch.device("meta")
# A kernel takes a tenth of a second to a half, a rank some forty of them.
_MAX_PROCESSES = 6
_PROMPT_TOKENS = 300


class ShapesOnly(Communicator):
    """A group of one process: its collectives return tensors of the right shapes, and those over the GPUs' memory
    launch what they would."""

    def __init__(self, config: RankConfig) -> None:
        super().__init__(rank=config.rank, world_size=config.world_size, collectives=_peer_path(config))
        self._is_recordable = config.world_size == 1 or not config.share_gpu

    @property
    def is_recordable(self) -> bool:
        return self._is_recordable

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self.collectives is not None:
            self.collectives.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        if self.collectives is not None:
            self.collectives.all_gather(tensor)
        return tensor.new_empty((self.world_size, *tensor.shape))


def _peer_path(config: RankConfig) -> PeerPath | None:
    """That which the ranks would open, over memory that is not there; None where they open none."""
    if config.device != "cuda" or not MIN_RANKS <= config.world_size <= MAX_RANKS or config.collectives == "group":
        return None
    rules = rules_for(gpu_name(), config.world_size, table=config.collectives_table)

    def words(dtype: torch.dtype) -> Tensor:
        return torch.empty(1, dtype=dtype, device=_DEVICE)

    buffers = PeerBuffers(
        rank=config.rank,
        world_size=config.world_size,
        capacity=PEER_CAPACITY,
        memory=words(torch.int32),
        addresses=words(torch.int64),
        state=words(torch.int64),
        error=words(torch.int32),
        report=words(torch.int32),
    )
    peers = PeerCollectives(buffers, max_looks=1, max_programs=1, starts_early=not config.share_gpu)
    return PeerPath(peers, rules.without_group() if config.share_gpu else rules, timeout_s=0.0)


class _Calls(Certificate):
    """Makes a certificate's calls and looks at no number."""

    def make(self) -> None:
        for _, _, check in self._checks():
            check()

    def _run(
        self,
        rows: int,
        width: int,
        work: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        expected: Callable[[list[Tensor], Tensor], tuple[Tensor, ...]],
    ) -> str | None:
        part, residual = (torch.empty(rows, width, dtype=self._dtype, device=self._device) for _ in range(2))
        work(part, residual)
        return None


@torch.inference_mode()
def launches_of(config: RankConfig, ops: OpSet) -> list[Launch]:
    """Every variant of a kernel that a rank of this configuration launches, once. Takes no memory of a GPU."""
    spec = read_spec(config.model)
    family = get_family(spec.family)
    with launches_told() as launches:
        _encode(config, spec, family, ops)
        _Rehearsal(config, spec, family, ops).run()
    return launches


def _encode(config: RankConfig, spec: ModelSpec, family: ModelFamily, ops: OpSet) -> None:
    if spec.image_input_shape is None:
        return
    dtype = getattr(torch, config.dtype)
    vision = family.build_vision(spec, ops=ops, dtype=dtype, device=_DEVICE)
    for count in range(1, MAX_IMAGES + 1):
        vision.encode_pixels(torch.empty((count, *spec.image_input_shape[1:]), dtype=dtype, device=_DEVICE))


class _Rehearsal:
    """The kinds of steps that a runner makes, once each."""

    def __init__(self, config: RankConfig, spec: ModelSpec, family: ModelFamily, ops: OpSet) -> None:
        self._config, self._spec, self._ops = config, spec, ops
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._comm = ShapesOnly(config)
        self._language: LanguageModel = family.build_language(
            spec, comm=self._comm, ops=ops, dtype=self._dtype, device=_DEVICE
        )
        self._language.expect_positions(config.max_model_len)
        self._slots = SlotTable(
            num_slots=config.max_num_seqs,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
            device=_DEVICE,
        )
        self._kv_cache = KVCache.allocate(
            num_layers=spec.num_layers,
            num_blocks=1,
            block_size=config.block_size,
            num_kv_heads=max(1, spec.num_kv_heads // config.world_size),
            head_dim=spec.head_dim,
            dtype=self._dtype,
            device=_DEVICE,
        )

    def run(self) -> None:
        config = self._config
        if self._comm.collectives is not None:
            _Calls.of_launch(config, self._spec, self._comm, dtype=self._dtype, device=_DEVICE).make()
        prompt = self._slice(0, min(_PROMPT_TOKENS, config.max_model_len))
        singles = [self._slice(slot, 1) for slot in range(1, config.max_num_seqs)]
        if self._ops.recorded is not None and self._comm.is_recordable:
            self._run_recorded(self._ops.recorded, prompt)
        for step in ([prompt], singles[:1], [prompt, *singles[:1]], [prompt, *singles]):
            if step:
                self._run_plain(step)
        for piece in (prompt, *singles):
            self._slots.release(piece.slot)
        for count in ROW_SIZES:  # prompts so short that products have kernels of their own
            piece = self._slice(0, min(count, config.max_model_len, config.max_num_batched_tokens))
            self._run_plain([piece])
            self._slots.release(piece.slot)
        self._run_plain(self._longest())

    def _longest(self) -> list[Slice]:
        """As many tokens as a step may have, or as slots take."""
        config, slices = self._config, []
        left = config.max_num_batched_tokens
        for slot in range(config.max_num_seqs):
            if count := min(left, config.max_model_len):
                slices.append(self._slice(slot, count))
                left -= count
        return slices

    def _slice(self, slot: int, count: int) -> Slice:
        """The whole of a new sequence."""
        blocks = (0,) * -(-count // self._config.block_size)
        piece = Slice(slot, 0, count, blocks, True)
        self._slots.take(NewSequence(slot, (0,) * count, count, (), SamplingRow()))
        self._slots.append_blocks(piece)
        return piece

    def _run_recorded(self, ops: RecordedOps, prompt: Slice) -> None:
        Decoder(
            self._language,
            ops=ops,
            slots=self._slots,
            kv_cache=self._kv_cache,
            comm=self._comm,
            max_num_seqs=self._config.max_num_seqs,
            vocab_size=self._spec.vocab_size,
        ).record()
        ShortSteps(
            self._language,
            ops=ops,
            slots=self._slots,
            kv_cache=self._kv_cache,
            comm=self._comm,
            vocab_size=self._spec.vocab_size,
            hidden_size=self._spec.hidden_size,
            dtype=self._dtype,
        ).launch([prompt], lay_out([prompt], slots=self._slots, features={}, width=self._spec.hidden_size))

    def _run_plain(self, slices: Sequence[Slice]) -> None:
        layout = lay_out(slices, slots=self._slots, features={}, width=self._spec.hidden_size)
        nothing = torch.empty((0, self._spec.hidden_size), dtype=self._dtype, device=_DEVICE)
        batch = pack(layout, slices, slots=self._slots, empty_features=nothing)
        logits = self._language.logits(self._language.forward(batch, self._kv_cache))
        self._ops.penalise(logits, self._slots.token_ids, [PenaltyRow(0, 0, 0, 1, presence=1.0)])
        self._ops.draw(logits, [DrawRow(temperature=1.0)] * logits.shape[0])


_launches: list[Launch] = []


def compile_all(launches: Sequence[Launch], *, processes: int, is_linked: bool = True) -> list[str]:
    """Compiles in processes that inherit the launches. Returns what went wrong, a traceback each.

    is_linked: whether the CUDA driver is there to link with, see `Launch.compile`.
    """
    # Those that take longest first.
    _launches[:] = sorted(launches, key=lambda launch: -len(launch.kernel.src))
    compile_one = partial(_compile, is_linked=is_linked)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        indexes = range(-1 if is_linked else 0, len(launches))
        return [error for error in pool.map(compile_one, indexes) if error is not None]


def _compile(index: int, *, is_linked: bool) -> str | None:
    """index: of a launch; -1 stands for what all of them need."""
    try:
        if index < 0:
            compile_driver()
        else:
            _launches[index].compile(launches=is_linked)
    except Exception:
        return traceback.format_exc()
    return None


def main(words: Sequence[str]) -> int:
    config = RankConfig(**json.loads(words[0]))
    compile_for(gpu_capability())
    Runner.preload(config)
    launches = launches_of(config, choose(config.kernels, config.device))
    processes = max(1, min(_MAX_PROCESSES, len(os.sched_getaffinity(0)) // 2, len(launches)))
    errors = compile_all(launches, processes=processes)
    for error in errors:
        print(error, file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
