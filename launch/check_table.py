"""The figures of a check as text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_vlm.launch.check import RankRun
    from dist_vlm.launch.compare import CheckReport, ProbeResult

_HEAD = ("probe", "tokens", "given", "free", "agree", "first divergence")


def run_table(run: RankRun) -> str:
    """One line a probe, one for all of them, and the verdict with its reasons."""
    lines = [f"{run.num_ranks} rank{'s' * (run.num_ranks > 1)}, {run.executor} executor"]
    if run.report is not None:
        lines += _aligned([_HEAD, *(_row(one) for one in run.report.probes), _total(run.report)])
    lines += [f"  {'FAILED: ' if index == 0 else '        '}{fault}" for index, fault in enumerate(run.faults)]
    return "\n".join(lines if run.faults else [*lines, "  passed"])


def _row(one: ProbeResult) -> tuple[str, ...]:
    length = f"{one.num_prompt_tokens} + {one.num_tokens}"
    if one.error is not None:
        return one.name, length, "-", "-", "-", "-"
    lost = one.divergence
    where = "-" if lost is None else f"{lost.index}: {lost.got} for {lost.expected}, gap {lost.gap:.1e}"
    agreed = f"{one.num_agreed}/{one.num_tokens}"
    return one.name, length, f"{one.forced_difference:.1e}", f"{one.free_difference:.1e}", agreed, where


def _total(report: CheckReport) -> tuple[str, ...]:
    measured = [one for one in report.probes if one.error is None]
    if not measured:
        return "all", "", "-", "-", "0 %", "-"
    forced = _most([one.forced_difference for one in measured])
    free = _most([one.free_difference for one in measured])
    gap = f"gap {report.max_gap:.1e}" if any(one.divergence for one in measured) else "-"
    return "all", "", f"{forced:.1e}", f"{free:.1e}", f"{report.agreement:.1%}", gap


def _most(values: list[float]) -> float:
    """The highest; not a number, if one of them is."""
    return max(values, key=lambda value: (math.isnan(value), value))


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
