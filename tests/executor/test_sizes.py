"""The ranks' number of KV blocks."""

from __future__ import annotations

import pytest

from dist_vlm.executor.base import StartError
from dist_vlm.executor.sizes import choose_num_blocks
from dist_vlm.workers.config import LoadReport


def report(rank: int, num_blocks: int) -> LoadReport:
    return LoadReport(rank, 0, 0, 0, 0, 4096, num_blocks, {}, 0)


def test_the_tightest_rank_decides() -> None:
    assert choose_num_blocks([report(0, 30), report(1, 20), report(2, 25)], None) == 20
    assert choose_num_blocks([report(0, 30), report(1, 20)], 7) == 7


def test_more_than_fit_are_refused_with_both_numbers() -> None:
    with pytest.raises(StartError, match="allocate failed .rank 1.: 21 KV blocks asked for, 20 fit"):
        choose_num_blocks([report(0, 30), report(1, 20)], 21)


def test_no_room_at_all_is_an_error() -> None:
    with pytest.raises(StartError, match="no KV block of 4096 bytes fits"):
        choose_num_blocks([report(0, 0)], None)
