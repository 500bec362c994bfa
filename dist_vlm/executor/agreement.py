"""All ranks must give the same answer: they sample from the same logits with the same noise."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from dist_vlm.executor.base import ExecutorError
from dist_vlm.workers.plan import StepCounters, StepResult


def agreed(results: Sequence[StepResult], step_id: int) -> StepResult:
    """Rank 0's result, once all are equal but for `rank` and `counters`. Raises `ExecutorError` naming who differs."""
    for rank, result in enumerate(results):
        if result.rank != rank or result.step_id != step_id:
            cause = (
                f"expected the answer of rank {rank} to step {step_id}, got rank {result.rank}, step {result.step_id}"
            )
            raise ExecutorError("step", cause, rank)
    if len(results) == 1:
        return results[0]
    answers = [dataclasses.replace(result, rank=0, counters=StepCounters()) for result in results]
    if any(answer != answers[0] for answer in answers):
        _raise_disagreement(answers, step_id)
    return results[0]


def _raise_disagreement(answers: Sequence[StepResult], step_id: int) -> None:
    groups = Counter(answers)
    common = groups.most_common(1)[0][0]
    odd = [rank for rank, answer in enumerate(answers) if answer != common]
    fields = [
        field.name
        for field in dataclasses.fields(StepResult)
        if any(getattr(answers[rank], field.name) != getattr(common, field.name) for rank in odd)
    ]
    if 2 * groups[common] > len(answers):
        who = f"{_ranks(odd)} from the others"
    else:
        who = f"{_ranks(range(len(answers)))} among themselves"
    blamed = odd[0] if 2 * groups[common] > len(answers) else None
    raise ExecutorError("step", f"ranks disagree in step {step_id}: {who} differ in {', '.join(fields)}", blamed)


def _ranks(ranks: Sequence[int]) -> str:
    return ("ranks " if len(ranks) > 1 else "rank ") + ", ".join(str(rank) for rank in ranks)
