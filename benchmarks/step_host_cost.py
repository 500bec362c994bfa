"""What a decode step costs the host: in the driver, and on a rank whose device has nothing to do. Prints JSON.

The driver is an offline loop over a scripted transport: plans are made, written and sent, answers are read, committed
and made text; what the script takes is not counted. The rank is a `Worker` with the project's `Runner`, whose recorded
decode step returns at once; copies to the device, which is the CPU, are a part of its cost, and small.

    python benchmarks/step_host_cost.py --sequences 1 64 256
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from dist_vlm.engine.core import EngineCore
from dist_vlm.engine.jobs import jobs_of
from dist_vlm.engine.messages import EngineRequest
from dist_vlm.engine.offline_loop import OfflineLoop
from dist_vlm.engine.processor import ProcessedPrompt
from dist_vlm.executor.fake import FakeExecutor
from dist_vlm.executor.in_flight import PlansInFlight
from dist_vlm.executor.transport import Transport
from dist_vlm.sampling import SamplingParams
from dist_vlm.workers import wire
from dist_vlm.workers.computed import SLOT_FAILURES
from dist_vlm.workers.config import LoadReport, RankConfig
from dist_vlm.workers.decode import Decoder
from dist_vlm.workers.pending import FinishedSteps
from dist_vlm.workers.plan import NewSequence, SampledTokens, SamplingRow, Slice, StepPlan, StepResult
from dist_vlm.workers.runner import Runner
from dist_vlm.workers.slots import SlotTable
from dist_vlm.workers.worker import Worker

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from dist_vlm.workers.comm import Communicator

BLOCK_SIZE = 16
PROMPT_TOKENS = 20
TOKENS = 200
VOCAB = 1000
_PARTS = ("plan", "submit", "collect", "commit")


class Clock:
    """Sums the seconds that the driver spends in its parts, and leaves out what is not its own."""

    def __init__(self) -> None:
        self.foreign = 0.0
        self.parts = dict.fromkeys(_PARTS, 0.0)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began, foreign = time.perf_counter(), self.foreign
            try:
                return function(*arguments)
            finally:
                self.parts[part] += time.perf_counter() - began - (self.foreign - foreign)

        return call

    def reading(self) -> tuple[float, dict[str, float]]:
        return time.perf_counter() - self.foreign, dict(self.parts)


class ScriptedTransport(Transport):
    """A rank that has the answer to a message at once: each sampling slice gets the token that is its position."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._answers: deque[bytes] = deque()
        self.readings: list[tuple[int, float, dict[str, float]]] = []

    def send(self, message: bytes) -> None:
        began = time.perf_counter()
        plan = wire.decode(StepPlan, message)
        ends = ((piece.slot, piece.start + piece.count) for piece in plan.slices if piece.sample)
        sampled = tuple(SampledTokens(slot, (end % VOCAB,)) for slot, end in ends)
        self._answers.append(wire.encode(FinishedSteps((StepResult(plan.step_id, 0, sampled),))))
        self._clock.foreign += time.perf_counter() - began
        self.readings.append((len(plan.slices), *self._clock.reading()))

    def receive(self, timeout_s: float) -> list[bytes]:
        return [self._answers.popleft()]

    def close(self) -> None:
        pass


class ScriptedExecutor(FakeExecutor):
    """The calls of an executor that crosses to its rank through `ScriptedTransport`."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(num_blocks=1 << 14)
        self.transport = ScriptedTransport(clock)
        self._plans = PlansInFlight(self.transport, num_ranks=1, limit=4)
        self.submit = clock.timed("submit", self._plans.submit)  # type: ignore[method-assign]
        self.collect = clock.timed("collect", self._collect)  # type: ignore[method-assign]

    def _collect(self) -> StepResult:
        self.last_results = self._plans.collect(60.0)
        return self.last_results[0]


class TokenPrompts:
    """In place of the processor: requests of prompts that are token ids already."""

    def process(self, request_id: str, inputs: Any, params: SamplingParams, **_: Any) -> ProcessedPrompt:
        tokens = tuple(inputs["prompt_token_ids"])
        request = EngineRequest(request_id, tokens, (), SamplingRow(), params.max_tokens or 1, frozenset())
        return ProcessedPrompt(request_id, None, (request,))


def words_tokenizer() -> Tokenizer:
    """Made-up words, decoded in the steps of a Llama tokenizer."""
    from tokenizers import Tokenizer, decoders, models

    words = {f"▁w{index:x}": index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="▁w0"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def driver_ms(num_sequences: int) -> dict[str, float]:
    """Milliseconds of a step in which `num_sequences` sequences decode, the median of all such steps, and where they
    go: the parts are means."""
    clock = Clock()
    executor = ScriptedExecutor(clock)
    core = EngineCore(
        executor,
        block_size=BLOCK_SIZE,
        max_model_len=PROMPT_TOKENS + TOKENS,
        max_num_seqs=num_sequences,
        max_num_batched_tokens=8192,
        depth=2,
    )
    core.start()
    core.scheduler.plan = clock.timed("plan", core.scheduler.plan)  # type: ignore[method-assign]
    core.scheduler.commit = clock.timed("commit", core.scheduler.commit)  # type: ignore[method-assign]
    tokenizer = SimpleNamespace(backend_tokenizer=words_tokenizer())
    front: Any = SimpleNamespace(
        processor=TokenPrompts(), tokenizer=tokenizer, spec=SimpleNamespace(eos_token_ids=frozenset())
    )
    prompts = [
        {"prompt_token_ids": [(index + place) % VOCAB for place in range(PROMPT_TOKENS)]}
        for index in range(num_sequences)
    ]
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    with ThreadPoolExecutor(1) as preparers:
        ending = weakref.finalize(core, lambda: None)
        loop = OfflineLoop(core, front, max_num_seqs=num_sequences, preparers=preparers, ending=ending)
        final = list(loop.run(jobs_of(prompts, params, 0), raise_errors=True, only_ends=True))
    if len(final) != num_sequences or any(len(one.outputs[0].token_ids) != TOKENS for one in final):
        raise RuntimeError("the loop did not answer every prompt in full")
    return steady_ms(executor.transport.readings, num_sequences)


def steady_ms(readings: Sequence[tuple[int, float, dict[str, float]]], num_sequences: int) -> dict[str, float]:
    steps = [
        (after[1] - before[1], {part: after[2][part] - before[2][part] for part in _PARTS})
        for before, after in zip(readings[8:-8], readings[9:-7], strict=True)
        if before[0] == after[0] == num_sequences
    ]
    whole = statistics.median(step[0] for step in steps)
    parts = {part: statistics.median(step[1][part] for step in steps) for part in _PARTS}
    parts["outputs"] = whole - sum(parts.values())
    return {"step": round(1e3 * whole, 4), **{part: round(1e3 * seconds, 4) for part, seconds in parts.items()}}


class NoRecording:
    """A recorded step that returns what it returned before."""

    def __init__(self, size: int) -> None:
        self.table = torch.zeros((1 + len(SLOT_FAILURES), size), dtype=torch.int64)

    def replay(self) -> torch.Tensor:
        return self.table


class HostRunner(Runner):
    """The runner without a model: all that a plan of decode slices asks of the host."""

    def __init__(self, config: RankConfig, comm: Communicator) -> None:
        self.config, self.comm = config, comm
        self.device, self.processors, self._encodes_later = torch.device("cpu"), {}, False
        self.slots = SlotTable(
            num_slots=config.max_num_seqs,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
            device=self.device,
        )
        nothing = SimpleNamespace(
            num_encoded=0,
            features={},
            drop=lambda keys: None,
            encode=lambda keys, images: (),
            copy_blocks=lambda pairs: None,
        )
        stand_in: Any = nothing
        self.features = self.kv_cache = self.images = stand_in
        self._short_steps = None
        self._decoder = Decoder(
            stand_in,
            ops=stand_in,
            slots=self.slots,
            kv_cache=stand_in,
            comm=comm,
            max_num_seqs=config.max_num_seqs,
            vocab_size=8,
        )
        recordings: Any = {size: NoRecording(size) for size in self._decoder._sizes}
        self._decoder._recordings = recordings

    @staticmethod
    def preload(config: RankConfig) -> None:
        pass

    def load(self) -> LoadReport:
        return LoadReport(0, 0, 0, 0, 0, 1, 1, {}, 0)

    def allocate(self, num_blocks: int) -> None:
        pass

    @staticmethod
    def fill(slots: SlotTable, count: int) -> None:
        for slot in range(count):
            slots.take(NewSequence(slot, tuple(range(PROMPT_TOKENS)), PROMPT_TOKENS, (), SamplingRow()))


def rank_ms(num_sequences: int) -> dict[str, float]:
    """Milliseconds of `Worker.step` with a plan of as many decode slices: the median, one slice in 16 with a block."""
    config = RankConfig(
        model="none",
        dtype="float32",
        device="cpu",
        load_format="dummy",
        rank=0,
        world_size=1,
        block_size=BLOCK_SIZE,
        max_model_len=4096,
        max_num_seqs=num_sequences,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=0.9,
        kv_cache_bytes=None,
        num_threads=1,
        kernels="reference",
        share_gpu=False,
        collectives="group",
        collectives_table=None,
        halve_step_tokens=None,
        seed=0,
        feature_cache_tokens=0,
        vision_data_parallel=False,
    )
    worker = Worker(wire.encode(config), "step_host_cost:HostRunner")
    worker.prepare("127.0.0.1", 1.0)
    worker.load()
    worker.allocate(1)
    runner: HostRunner = worker._runner
    runner.fill(runner.slots, num_sequences)
    seconds = []
    for step in range(TOKENS):
        slices = []
        for slot in range(num_sequences):
            position = step if step == 0 else step + slot % BLOCK_SIZE
            crosses = step == 0 or position % BLOCK_SIZE == 0
            first = tuple(range(2)) if step == 0 else (position // BLOCK_SIZE + 1,) if crosses else ()
            slices.append(Slice(slot, position, 1, first, True))
        message = wire.encode(StepPlan(step, slices=tuple(slices)))
        began = time.perf_counter()
        worker.step(message)
        seconds.append(time.perf_counter() - began)
    return {"step": round(1e3 * statistics.median(seconds[8:]), 4)}


def measured(measure: Callable[[int], dict[str, float]], num_sequences: int, rounds: int) -> dict[str, float]:
    """The round with the quickest step: what else the machine does only adds."""
    return min((measure(num_sequences) for _ in range(rounds)), key=lambda found: found["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))  # the worker imports its runner by name
    torch.set_num_threads(1)
    rows = [
        {
            "sequences": count,
            "driver_ms": measured(driver_ms, count, arguments.rounds),
            "rank_ms": measured(rank_ms, count, arguments.rounds),
        }
        for count in arguments.sequences
    ]
    report = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    json.dump({**report, "rounds": arguments.rounds, "steps": rows}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
