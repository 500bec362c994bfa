"""Penalties of the tokens that a sequence holds: Triton's kernel against torch's operations and against their bytes.

The kernel alone, with the counts that it clears first, is timed in a CUDA graph; a call, with the upload of what the
rows ask, by many calls one after another, as many as the host can make. The least time is that of the counts written,
the known tokens read and their logits read and written, at the rate of a large copy measured in the same run. Each row
has a prompt of one picture and some text, and an answer after it. Needs a GPU.

    python benchmarks/kernels/penalties.py --out penalties.json
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from draw import Row, calls_us, make_logits, show
from elementwise import copy_bytes_per_us, graph_us, host_us
from gpu_program import run
from torch import Tensor

from dist_vlm.kernels.penalties import PenaltyRow, penalise
from dist_vlm.kernels.penalties_triton import launch, penalise_triton, settings_of
from dist_vlm.kernels.upload import to_device

ASKED = {
    "repetition": {"repetition": 1.1},
    "presence, frequency": {"presence": 0.5, "frequency": 0.1},
    "all three": {"repetition": 1.1, "presence": 0.5, "frequency": 0.1},
}


def measure(asked: str, num_rows: int, *, token_ids: Tensor, begin: int, vocab: int, rate: float) -> Row:
    device, end = token_ids.device, token_ids.shape[1]
    rows = [PenaltyRow(index, index, begin, end, **ASKED[asked]) for index in range(num_rows)]
    settings = to_device(settings_of(rows), device)
    known = end if "repetition" in ASKED[asked] else end - begin
    least = num_rows * (4 * vocab + known * (8 + 2 * 4)) / rate
    inputs: list[tuple[Any, ...]] = [(make_logits(num_rows, vocab, device), token_ids)]
    by_triton, by_torch = partial(penalise_triton, rows=rows), partial(penalise, rows=rows)
    return Row(
        asked,
        num_rows,
        least,
        graph_us(partial(launch, settings=settings), inputs),
        calls_us(by_triton, inputs),
        calls_us(by_torch, inputs),
        host_us(by_triton, inputs),
        host_us(by_torch, inputs),
    )


def report(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda")
    rate = copy_bytes_per_us(device)
    print(f"{torch.cuda.get_device_name()}: copy {rate / 1e6:.2f} TB/s, vocabulary of {arguments.vocab}")
    print("asked                  rows  least us  kernel us triton us  torch us     gain host: us  torch us")
    most, end = max(arguments.rows), arguments.prompt_tokens + arguments.output_tokens
    token_ids = torch.randint(arguments.vocab, (most, end), device=device)
    measured = []
    for asked in ASKED:
        for rows in arguments.rows:
            measured.append(
                measure(
                    asked, rows, token_ids=token_ids, begin=arguments.prompt_tokens, vocab=arguments.vocab, rate=rate
                )
            )
            show(measured[-1])
    return {
        "vocab": arguments.vocab,
        "prompt_tokens": arguments.prompt_tokens,
        "output_tokens": arguments.output_tokens,
        "copy_tb_per_s": rate / 1e6,
        "rows": [asdict(row) for row in measured],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256], help="rows of a call")
    parser.add_argument("--prompt-tokens", type=int, default=640)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=32000)
    run(parser, report)


if __name__ == "__main__":
    main()
