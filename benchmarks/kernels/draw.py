"""The draw of sampled tokens: Triton's kernel against torch's operations and against one read of the logits.

The kernel alone is timed in a CUDA graph over enough sets of logits to fill the L2 cache several times; a call, with
the upload of what the rows ask, by many calls one after another, as many as the host can make. The least time is that
of the logits read once at the rate of a large copy, measured in the same run. Logits are rounded to bfloat16, as a
model's are, so that many of a row are equal. Needs a GPU.

    python benchmarks/kernels/draw.py --out draw.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from elementwise import COLD_BYTES, MAX_SETS, copy_bytes_per_us, event_us, graph_us, host_us
from gpu_program import run
from torch import Tensor

from dist_vlm.kernels import sample
from dist_vlm.kernels.draw_triton import draw_triton, launch, settings_of
from dist_vlm.kernels.sample import DrawRow
from dist_vlm.kernels.upload import to_device

ASKED = {
    "temperature": DrawRow(0.8),
    "top_k 50": DrawRow(0.8, top_k=50),
    "top_p 0.9": DrawRow(0.8, top_p=0.9),
    "top_k 50, top_p 0.9": DrawRow(0.8, top_k=50, top_p=0.9),
}
CALLS = 16  # between two events


@dataclass(frozen=True, slots=True)
class Row:
    """Microseconds of one call. kernel_us: of the kernel alone; `*_host_us`: what a call costs the thread."""

    asked: str
    rows: int
    least_us: float
    kernel_us: float
    triton_us: float
    torch_us: float
    triton_host_us: float
    torch_host_us: float


def make_logits(rows: int, vocab: int, device: torch.device) -> Tensor:
    """A few tokens are likely, and the others are spread like a model's."""
    logits = 2 * torch.randn(rows, vocab, device=device)
    likely = torch.randint(0, vocab, (rows, 64), device=device)
    logits.scatter_add_(1, likely, torch.linspace(14, 2, 64, device=device).expand(rows, -1))
    return logits.to(torch.bfloat16).float()


def calls_us(call: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> float:
    def run() -> None:
        for index in range(CALLS):
            call(*inputs[index % len(inputs)])

    run()
    torch.cuda.synchronize()
    return event_us(run) / CALLS


def measure(asked: str, num_rows: int, vocab: int, *, rate: float, device: torch.device) -> Row:
    num_bytes = 4 * num_rows * vocab
    rows = [ASKED[asked]._replace(seed=index, position=100 + index) for index in range(num_rows)]
    settings = to_device(settings_of(rows), device)
    sets = max(1, min(MAX_SETS, COLD_BYTES // num_bytes))
    inputs: list[tuple[Any, ...]] = [(make_logits(num_rows, vocab, device),) for _ in range(sets)]
    by_triton, by_torch = partial(draw_triton, rows=rows), partial(sample.draw, rows=rows)
    return Row(
        asked,
        num_rows,
        num_bytes / rate,
        graph_us(partial(launch, settings=settings), inputs),
        calls_us(by_triton, inputs),
        calls_us(by_torch, inputs),
        host_us(by_triton, inputs),
        host_us(by_torch, inputs),
    )


def show(row: Row) -> None:
    print(
        f"{row.asked:20} {row.rows:6} {row.least_us:9.2f} {row.kernel_us:10.2f} {row.triton_us:9.1f}"
        f" {row.torch_us:9.1f} {row.torch_us / row.triton_us:7.1f}x {row.triton_host_us:9.1f} {row.torch_host_us:9.1f}",
        flush=True,
    )


def report(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda")
    rate = copy_bytes_per_us(device)
    print(f"{torch.cuda.get_device_name()}: copy {rate / 1e6:.2f} TB/s, vocabulary of {arguments.vocab}")
    print("asked                  rows  least us  kernel us triton us  torch us     gain host: us  torch us")
    measured = []
    for asked in arguments.asked:
        for rows in arguments.rows:
            measured.append(measure(asked, rows, arguments.vocab, rate=rate, device=device))
            show(measured[-1])
    return {
        "vocab": arguments.vocab,
        "copy_tb_per_s": rate / 1e6,
        "rows": [asdict(row) for row in measured],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--asked", nargs="+", default=list(ASKED), choices=list(ASKED), help="what all rows ask")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256], help="rows of a call")
    parser.add_argument("--vocab", type=int, default=32000)
    run(parser, report)


if __name__ == "__main__":
    main()
