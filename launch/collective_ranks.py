"""Starts the ranks that measure collectives, one a GPU of this machine, and gathers what they found."""

from __future__ import annotations

import dataclasses
import json
import select
import subprocess
import sys
import tempfile
from typing import IO, Any

from dist_vlm.launch.collective_rank import FOUND, RankJob

# What a rank takes to end once rank 0 has.
_EXIT_S = 60.0


class MeasureError(RuntimeError):
    """A rank failed; the message has the end of what it said."""


def measure(
    *,
    world_size: int,
    hidden_size: int,
    columns: int,
    dtype: str,
    row_counts: list[int],
    others: bool = False,
    timeout_s: float = 600.0,
) -> dict[str, Any]:
    """device: the GPU's name; link_bytes_per_s; times: see `CollectiveTimes.measure`. Raises `MeasureError`.

    columns: of a rank's part of the logits. others: also what torch has of its own.
    """
    first = RankJob(0, world_size, 0, hidden_size, columns, dtype, row_counts, others)
    with tempfile.TemporaryFile("w+") as errors:
        ranks = [_start(first, errors)]
        try:
            assert ranks[0].stdout is not None
            told, _, _ = select.select([ranks[0].stdout], [], [], timeout_s)
            port = ranks[0].stdout.readline().strip() if told else ""
            if not port.isdigit():
                raise MeasureError(f"rank 0 opened no rendezvous within {timeout_s:g} s: {port} {_said(errors)}")
            for rank in range(1, world_size):
                ranks.append(_start(dataclasses.replace(first, rank=rank, port=int(port)), errors))
            out, _ = ranks[0].communicate(timeout=timeout_s)
            codes = [process.wait(timeout=_EXIT_S) for process in ranks]
            if any(codes):
                raise MeasureError(f"exit statuses {codes}: {_said(errors)}")
            (line,) = (line for line in out.splitlines() if line.startswith(FOUND))
            found: dict[str, Any] = json.loads(line.removeprefix(FOUND))
            return found
        except subprocess.TimeoutExpired as error:
            raise MeasureError(f"not done within {error.timeout:g} s: {_said(errors)}") from None
        finally:
            for process in ranks:
                process.kill()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()


def _start(job: RankJob, errors: IO[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dist_vlm.launch.collective_rank", job.line()]
    # What nobody reads may not stand in a pipe, which holds little.
    out = subprocess.PIPE if job.rank == 0 else errors
    return subprocess.Popen(command, stdout=out, stderr=errors, text=True)


def _said(errors: IO[str]) -> str:
    errors.seek(0)
    return errors.read()[-2000:].strip()
