"""Paged attention in Triton against torch's flash attention, FlashInfer, and its floor. Needs a GPU.

    python benchmarks/kernels/attention.py --out attention.json

Each case is timed in a CUDA graph over enough caches, as the layers of a model have, that the L2 cache serves none.
The least time is that of the keys and values read once, at the rate at which a large copy reads and writes, or of the
causal multiplications and additions at the rate of a large matrix product, whichever is longer; both rates are measured
in the same run. Ours and FlashInfer read blocks in random order. Torch's keys and values are CONTIGUOUS, which those of
no paged cache are: its time leaves out the copy that would make them so. FlashInfer is measured where it is installed;
it compiles each kernel when it first meets it. A result that is not torch's is an error, and gets no time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import triton
from elementwise import COLD_BYTES, graph_us
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from dist_vlm.kernels.paged_attention_triton import paged_attention_triton
from dist_vlm.kernels.paged_plan_triton import cut_tiles, plan_decode_triton, plan_tiles_triton
from dist_vlm.launch import bench_rates
from dist_vlm.launch.bench_flags import whole
from dist_vlm.launch.bench_record import git_commit

ROOT = Path(__file__).resolve().parents[2]

BLOCK_SIZE = 16
HEADS = {"32/32": (32, 32), "64/8": (64, 8)}  # query heads / KV heads
PREFILLS = ((1, 704, 704), (4, 704, 704), (1, 512, 2048))  # sequences, tokens and positions of each
COPY_BYTES = 1 << 30
MATRIX_SIZE = 8192
WORKSPACE_BYTES = 256 << 20  # of FlashInfer
# Of queries. Scores spread so far that few positions count: a mean of many is near zero, right or wrong.
SPREAD = 4.0
TOLERANCE = 2e-2

Attend = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """`batch` sequences with `context` positions each, of which the last `tokens` ask."""

    heads: int
    kv_heads: int
    batch: int
    tokens: int
    context: int
    head_dim: int = 128

    def __str__(self) -> str:
        kind = "decode" if self.tokens == 1 else "prefill"
        return f"{kind} {self.heads}/{self.kv_heads} {self.batch} x {self.tokens} of {self.context}"

    @property
    def kv_bytes(self) -> int:
        """Of the keys and values, two bytes a number."""
        return 4 * self.batch * self.context * self.kv_heads * self.head_dim

    @property
    def flop(self) -> int:
        """Two products of `head_dim` numbers for each position that a token sees."""
        seen = self.tokens * (self.context - self.tokens) + self.tokens * (self.tokens + 1) // 2
        return 4 * self.batch * self.heads * self.head_dim * seen

    def least_us(self, rates: bench_rates.DeviceRates) -> float:
        return 1e6 * max(self.kv_bytes / rates.copy_bytes_per_s, self.flop / rates.matmul_flop_per_s)


@dataclass(frozen=True, slots=True)
class Row:
    """Microseconds of one call. flashinfer_us: None where it was not measured."""

    case: Case
    least_us: float
    triton_us: float
    torch_us: float
    flashinfer_us: float | None


@dataclass(frozen=True, slots=True)
class Inputs:
    """queries: [sets, T, heads, D]. caches: [sets, 2, blocks, BLOCK_SIZE, kv_heads, D]. tables: int32 [batch, blocks of
    a sequence], the same for all sets."""

    queries: Tensor
    caches: Tensor
    tables: Tensor

    def paged(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [(q, cache[0], cache[1]) for q, cache in zip(self.queries, self.caches, strict=True)]

    def contiguous(self, case: Case) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each set [batch, heads, T, D], in the order of [batch, T, heads, D], which flash attention reads."""
        blocks = self.tables.long()

        def gather(cache: Tensor) -> Tensor:
            return cache[blocks].flatten(1, 2)[:, : case.context].contiguous().transpose(1, 2)

        queries = self.queries.unflatten(1, (case.batch, case.tokens)).transpose(2, 3)
        return [(q, gather(cache[0]), gather(cache[1])) for q, cache in zip(queries, self.caches, strict=True)]


def make_inputs(case: Case, sets: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    blocks = -(-case.context // BLOCK_SIZE)
    random = partial(torch.randn, dtype=dtype, device=device)
    return Inputs(
        random(sets, case.batch * case.tokens, case.heads, case.head_dim).mul_(SPREAD),
        random(sets, 2, case.batch * blocks, BLOCK_SIZE, case.kv_heads, case.head_dim),
        torch.randperm(case.batch * blocks, device=device).view(case.batch, blocks).to(torch.int32),
    )


def by_triton(case: Case, tables: Tensor) -> Attend:
    slots = torch.arange(case.batch, device=tables.device)
    plan = plan_decode_triton(slots, torch.full_like(slots, case.context), tables, block_size=BLOCK_SIZE)
    if case.tokens > 1:
        pieces = [(row * case.tokens, (row + 1) * case.tokens, case.context, row) for row in range(case.batch)]
        tiles = torch.tensor(cut_tiles(pieces), dtype=torch.int32, device=tables.device)
        plan = plan_tiles_triton(tiles, case.batch * case.tokens, tables, block_size=BLOCK_SIZE)
    return partial(paged_attention_triton, plan=plan, scale=case.head_dim**-0.5)


def by_torch(case: Case) -> Attend:
    """Flash attention or an error."""
    options: dict[str, Any] = {"enable_gqa": case.heads != case.kv_heads}
    if case.tokens == case.context:
        options["is_causal"] = True
    elif case.tokens > 1:
        options["attn_mask"] = causal_lower_right(case.tokens, case.context)

    def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, keys, values, **options)

    return attend


def by_flashinfer(flashinfer: ModuleType, case: Case, tables: Tensor) -> Attend:
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device=tables.device)
    last = torch.full((case.batch,), (case.context - 1) % BLOCK_SIZE + 1, dtype=torch.int32, device=tables.device)
    pages = (starts * tables.shape[1], tables.flatten(), last)
    sizes = (case.heads, case.kv_heads, case.head_dim, BLOCK_SIZE)
    dtypes = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=tables.device)
    if case.tokens == 1:
        # Its tensor cores are for groups of query heads.
        grouped = case.heads != case.kv_heads
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=grouped)
        wrapper.plan(*pages, *sizes, **dtypes)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(starts * case.tokens, *pages, *sizes, causal=True, **dtypes)
    return lambda q, keys, values: wrapper.run(q, (keys, values))


def check(case: Case, name: str, actual: Tensor, expected: Tensor) -> None:
    """Raises `AssertionError` with the case, unless `actual` [T, heads, D] is torch's [batch, heads, T, D]."""
    torch.testing.assert_close(
        actual,
        expected.transpose(1, 2).flatten(0, 1),
        atol=TOLERANCE,
        rtol=TOLERANCE,
        msg=lambda problem: f"{case}: {name} is not what torch computes: {problem}",
    )


def measure(case: Case, rates: bench_rates.DeviceRates, flashinfer: ModuleType | None, device: torch.device) -> Row:
    inputs = make_inputs(case, -(-COLD_BYTES // case.kv_bytes), torch.bfloat16, device)
    paged, contiguous, torch_attend = inputs.paged(), inputs.contiguous(case), by_torch(case)
    paged_attends = {"triton": by_triton(case, inputs.tables)}
    if flashinfer is not None:
        paged_attends["flashinfer"] = by_flashinfer(flashinfer, case, inputs.tables)
    expected = torch_attend(*contiguous[0])
    for name, attend in paged_attends.items():
        check(case, name, attend(*paged[0]), expected)
    times = {name: graph_us(attend, paged) for name, attend in paged_attends.items()}
    torch_us = graph_us(torch_attend, contiguous)
    return Row(case, case.least_us(rates), times["triton"], torch_us, times.get("flashinfer"))


def show(row: Row) -> None:
    share, gain = row.least_us / row.triton_us, row.torch_us / row.triton_us
    flashinfer = "-" if row.flashinfer_us is None else f"{row.flashinfer_us:.2f}"
    print(
        f"{row.case!s:34} {row.least_us:9.2f} {row.triton_us:9.2f} {row.torch_us:9.2f} {flashinfer:>13}"
        f" {share:8.0%} {gain:7.2f}x",
        flush=True,
    )


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    decodes = [(batch, 1, context) for batch in arguments.batches for context in arguments.contexts]
    sizes = {"decode": decodes, "prefill": PREFILLS}
    return [Case(*HEADS[heads], *size) for heads in arguments.heads for kind in arguments.kinds for size in sizes[kind]]


def find_flashinfer() -> ModuleType | None:
    try:
        import flashinfer
    except ImportError:
        return None
    return flashinfer


def report(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda")
    flashinfer = None if arguments.without_flashinfer else find_flashinfer()
    rates = bench_rates.measure(device, "bfloat16", copy_bytes=COPY_BYTES, matrix_size=MATRIX_SIZE)
    copy_tb_per_s, matmul_tflop_per_s = rates.copy_bytes_per_s / 1e12, rates.matmul_flop_per_s / 1e12
    print(f"{torch.cuda.get_device_name()}: copy {copy_tb_per_s:.2f} TB/s, product {matmul_tflop_per_s:.0f} TFLOP/s")
    print("case                                least us triton us  torch us flashinfer us of least    gain")
    rows = []
    for case in cases_of(arguments):
        rows.append(measure(case, rates, flashinfer, device))
        show(rows[-1])
    software = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(ROOT) if arguments.commit is None else arguments.commit,
        "device": torch.cuda.get_device_name(),
        "software": software | {"flashinfer": None if flashinfer is None else flashinfer.__version__},
        "dtype": "bfloat16",
        "block_size": BLOCK_SIZE,
        "copy_tb_per_s": copy_tb_per_s,
        "matmul_tflop_per_s": matmul_tflop_per_s,
        "rows": [asdict(row) for row in rows],
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS), help="query heads / KV heads")
    parser.add_argument("--kinds", nargs="+", default=["decode", "prefill"], choices=["decode", "prefill"])
    parser.add_argument("--batches", type=whole(1), nargs="+", default=[1, 16, 64, 256], help="sequences that decode")
    parser.add_argument("--contexts", type=whole(1), nargs="+", default=[128, 704, 2048], help="positions of each")
    parser.add_argument("--without-flashinfer", action="store_true", help="even where it is installed")
    parser.add_argument("--commit", help="in place of what git says")
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    arguments = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    measured = report(arguments)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
