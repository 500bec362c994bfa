"""What is compiled ahead against what a rank launches; without a GPU the rank's kernels are interpreted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, KernelInterface, create_function_from_signature

from dist_vlm.kernels import paged_decode_triton
from dist_vlm.kernels.all_reduce.peer_buffers import PEER_CAPACITY
from dist_vlm.kernels.all_reduce.rules import rules_for
from dist_vlm.kernels.choice import OpSet, choose
from dist_vlm.kernels.compile_only import Launch, launches_told
from dist_vlm.kernels.linear_triton import linear_triton
from dist_vlm.workers import compile_ahead
from dist_vlm.workers.collectives import PeerPath
from dist_vlm.workers.comm import Communicator, single_rank
from dist_vlm.workers.compile_ahead import ShapesOnly, compile_all, launches_of
from dist_vlm.workers.plan import NewSequence, SamplingRow, Slice, StepPlan
from dist_vlm.workers.runner import Runner

from ..kernels.all_reduce import virtual_ranks
from .test_runner import pixels, rank_config, sequence

GPU = "NVIDIA H200"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = make_backend(GPUTarget("cuda", 90, 32))


def key(launch: Launch) -> tuple[str, str]:
    """By which Triton itself tells compiled kernels apart, interpreted ones too."""
    function = launch.kernel
    if not isinstance(function, JITFunction):
        function = JITFunction(function.fn, do_not_specialize=function.kwargs.get("do_not_specialize"))
    binder = create_function_from_signature(function.signature, function.params, BACKEND)
    _, specialization, options = binder(*launch.arguments, **launch.options)
    return function.fn.__name__, str((specialization, sorted(options.items())))


@contextmanager
def noted() -> Iterator[set[tuple[str, str]]]:
    """Keys of the launches that are made within it."""
    keys: set[tuple[str, str]] = set()
    before = KernelInterface.__getitem__

    def getitem(kernel: Any, grid: Any) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            keys.add(key(Launch(kernel, arguments, options)))
            return before(kernel, grid)(*arguments, **options)

        return run

    KernelInterface.__getitem__ = getitem
    try:
        yield keys
    finally:
        KernelInterface.__getitem__ = before


def ops_of_a_gpu() -> OpSet:
    """Those of a CPU leave `linear` to torch."""
    return dataclasses.replace(choose("triton", DEVICE), linear=linear_triton)


def runner_of(model: Path, keys: set[tuple[str, str]], dtype: str) -> Runner:
    """Interpreted, a product takes too long: its launches are noted, and torch computes it."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with launches_told() as launches:
            linear_triton(x, weight, bias)
        keys.update(key(launch) for launch in launches)
        return F.linear(x, weight, bias)

    runner = Runner(rank_config(model, kernels="triton", device=DEVICE, dtype=dtype), single_rank())
    runner.ops = dataclasses.replace(runner.ops, linear=linear)
    report = runner.load()
    runner.allocate(report.num_blocks)
    return runner


def serve(runner: Runner) -> None:
    """A prompt with a picture; decodes of one, three and two; a prompt beside decodes, recorded and, since it tells of
    its tokens, penalises and draws them, not; and one that does so while decoding goes on."""
    runner.stage("x", "pixel_values", pixels(0))
    chatty = SamplingRow(temperature=0.8, top_p=0.9, repetition_penalty=1.2, prompt_logprobs=1)
    words = (5, 6, 7, 8)
    plans = [
        StepPlan(0, new=(sequence(0),), encode=("x",), slices=(Slice(0, 0, 19, (0, 1), True),)),
        StepPlan(1, slices=(Slice(0, 19, 1, (), True),)),
        StepPlan(
            2,
            new=(sequence(1, words, ()), NewSequence(2, words, 4, (), chatty)),
            slices=(Slice(0, 20, 1, (), True), Slice(1, 0, 4, (2,), True), Slice(2, 0, 4, (3,), True)),
        ),
        StepPlan(3, slices=(Slice(0, 21, 1, (), True), Slice(1, 4, 1, (), True), Slice(2, 4, 1, (), True))),
        StepPlan(4, slices=(Slice(0, 22, 1, (), True), Slice(1, 5, 1, (), True))),
        StepPlan(
            5,
            new=(NewSequence(3, words, 4, (), chatty),),
            slices=(
                Slice(0, 23, 1, (), True),
                Slice(1, 6, 1, (), True),
                Slice(2, 5, 1, (), True),
                Slice(3, 0, 4, (4,), True),
            ),
        ),
    ]
    for plan in plans:
        runner.launch(plan).result()


@pytest.mark.parametrize(("dtype", "few_rows"), [("float32", set()), ("float16", {"_few_rows_kernel"})])
def test_what_a_rank_launches_is_compiled_ahead(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, few_rows: set[str]
) -> None:
    # So few that batches of this size are cut into parts, and others are not.
    monkeypatch.setattr(paged_decode_triton, "_WANTED_PROGRAMS", 4)
    config = rank_config(tiny_checkpoint, kernels="triton", device="cuda", dtype=dtype)
    ahead = {key(launch) for launch in launches_of(config, ops_of_a_gpu())}
    with noted() as launched:
        serve(runner_of(tiny_checkpoint, launched, dtype))
    names = {name for name, _ in launched}
    assert {
        "_prefill_kernel",
        "_decode_group_kernel",
        "_join_kernel",
        "_one_row_kernel",
        "_greedy_kernel",
        "_draw_kernel",
        "_penalise_kernel",
    } | few_rows <= names
    assert launched <= ahead, sorted(launched - ahead)
    assert len(ahead - launched) <= 4, sorted(ahead - launched)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_launches_of_a_great_model(facts_7b: Path, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_decode_triton, "_WANTED_PROGRAMS", 1056)  # as on a GPU
    changes = {"dtype": "bfloat16", "max_model_len": 4096, "max_num_seqs": 256, "max_num_batched_tokens": 8192}
    config = rank_config(facts_7b, kernels="triton", device="cuda", world_size=world_size, **changes)
    launches = launches_of(config, ops_of_a_gpu())
    decodes = [launch for launch in launches if launch.kernel.fn.__name__ == "_decode_kernel"]
    # By whether rows come in order, and positions in parts.
    options = {(launch.options["first_rows"], launch.options["is_split"]) for launch in decodes}
    assert options == {(a, b) for a in (True, False) for b in (True, False)}
    assert {launch.options["kv_heads"] for launch in decodes} == {32 // world_size}
    prefills = [launch for launch in launches if launch.kernel.fn.__name__ == "_prefill_kernel"]
    # Of short steps and of long ones.
    assert {launch.options["positions"] for launch in prefills} == {64, 32}
    assert len(launches) < 64, "a start would take too long"
    held = [x for launch in launches for x in launch.arguments if isinstance(x, Tensor)]
    assert {x.device.type for x in held} == {"meta"}


def collective_keys(model: Path) -> Callable[[virtual_ranks.Rank], set[tuple[str, str]]]:
    """A job of a virtual rank: the steps of `serve` in torch's ops, over peer memory. What it launches."""

    def job(rank: virtual_ranks.Rank) -> set[tuple[str, str]]:
        torch.set_num_threads(1)
        comm = Communicator(rank=rank.number, world_size=2)
        comm.collectives = PeerPath(rank.collectives, rules_for(GPU, 2), timeout_s=1.0)
        runner = Runner(rank_config(model, rank=rank.number, world_size=2), comm)
        runner._certify = lambda: None  # type: ignore[method-assign]
        report = runner.load()
        runner.allocate(report.num_blocks)
        with noted() as launched:
            serve(runner)
        comm.check()
        return launched

    return job


@pytest.mark.skipif(DEVICE == "cuda", reason="virtual ranks of a GPU cannot load a model beside one another")
def test_collectives_that_a_rank_launches_are_compiled_ahead(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_ahead, "gpu_name", lambda: GPU)
    config = rank_config(
        tiny_checkpoint, kernels="triton", device="cuda", world_size=2, collectives="fused", max_num_batched_tokens=9000
    )
    ahead = {key(launch) for launch in launches_of(config, ops_of_a_gpu())}
    launched = set().union(*virtual_ranks.run(2, collective_keys(tiny_checkpoint), capacity=PEER_CAPACITY))
    assert {name for name, _ in launched} == {"one_shot_kernel", "all_gather_kernel"}
    assert launched <= ahead, sorted(launched - ahead)
    # The certificate runs what long steps take too.
    assert "two_shot_kernel" in {name for name, _ in ahead}
    group = launches_of(dataclasses.replace(config, collectives="group"), ops_of_a_gpu())
    assert not {"one_shot_kernel", "all_gather_kernel"} & {launch.kernel.fn.__name__ for launch in group}


def test_ranks_that_cannot_record_have_no_recorded_steps(tiny_facts: Path) -> None:
    config = rank_config(tiny_facts, kernels="triton", device="cuda", world_size=2, share_gpu=True)
    assert not ShapesOnly(config).is_recordable
    names = {launch.kernel.fn.__name__ for launch in launches_of(config, ops_of_a_gpu())}
    assert "_prefill_kernel" in names and "_greedy_kernel" not in names


def test_collectives_have_the_shapes_of_a_group(tiny_facts: Path) -> None:
    comm = ShapesOnly(rank_config(tiny_facts, world_size=4))
    x = torch.empty((3, 5), device="meta", dtype=torch.bfloat16)
    assert comm.all_reduce(x) is x
    gathered = comm.all_gather(x)
    assert (gathered.shape, gathered.dtype, gathered.device.type) == ((4, 3, 5), torch.bfloat16, "meta")


class Kernel:
    """Stands for a kernel of Triton's, and notes who compiles it."""

    def __init__(self, path: Path | None) -> None:
        self.fn = lambda: None
        self.src = "x"
        self.path = path

    def run(self, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        if self.path is None:
            raise ValueError("no such instruction")
        assert warmup
        self.path.write_text(json.dumps(options))


def test_one_that_cannot_be_compiled_is_told_and_the_others_are_compiled(tmp_path: Path) -> None:
    paths = [tmp_path / str(index) for index in range(3)]
    kernels = [Kernel(paths[0]), Kernel(None), *map(Kernel, paths[1:])]
    launches = [Launch(kernel, (), {"num_warps": 4}) for kernel in kernels]
    (error,) = compile_all(launches, processes=2, is_linked=False)
    assert error.endswith("ValueError: no such instruction\n")
    assert [json.loads(path.read_text()) for path in paths] == [{"num_warps": 4}] * 3


def test_the_program_compiles_what_its_configuration_launches(
    tiny_facts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = rank_config(tiny_facts, kernels="triton", device=DEVICE)
    told: list[Any] = []
    monkeypatch.setattr(compile_ahead, "gpu_capability", lambda: 90)
    monkeypatch.setattr(compile_ahead, "compile_for", told.append)
    monkeypatch.setattr(compile_ahead, "compile_all", lambda launches, processes: told.append(launches) or ["a", "b"])
    words = [json.dumps(dataclasses.asdict(config))]
    assert compile_ahead.main(words) == 1
    assert capsys.readouterr().err == "a\nb\n"
    assert told[0] == 90 and "_prefill_kernel" in {launch.kernel.fn.__name__ for launch in told[1]}
    monkeypatch.setattr(compile_ahead, "compile_all", lambda launches, processes: [])
    assert compile_ahead.main(words) == 0
