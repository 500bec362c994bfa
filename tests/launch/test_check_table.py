from __future__ import annotations

import math
import textwrap

from dist_vlm.launch.check import RankRun
from dist_vlm.launch.check_table import run_table
from dist_vlm.launch.compare import CheckReport, Divergence, ProbeResult

SOUND = ProbeResult("0: noise", 94, 16, 1.2e-5, 3.4e-6, num_agreed=16)
LOST = ProbeResult("1: text alone", 7, 16, 2e-5, 1e-6, num_agreed=4, divergence=Divergence(4, 401, 83, 0.25))
FAILED = ProbeResult("2: shapes", 101, 16, error="no room")


def test_a_pass_is_a_table_and_a_word() -> None:
    assert run_table(RankRun(1, "inline", CheckReport(1e-3, (SOUND,)))) == textwrap.dedent("""\
        1 rank, inline executor
          probe     tokens   given    free     agree   first divergence
          0: noise  94 + 16  1.2e-05  3.4e-06  16/16   -
          all                1.2e-05  3.4e-06  100.0%  -
          passed""")


def test_a_failure_names_each_fault() -> None:
    text = run_table(RankRun(2, "ray", CheckReport(1e-3, (SOUND, LOST, FAILED))))
    assert text == textwrap.dedent("""\
        2 ranks, ray executor
          probe          tokens    given    free     agree  first divergence
          0: noise       94 + 16   1.2e-05  3.4e-06  16/16  -
          1: text alone  7 + 16    2.0e-05  1.0e-06  4/16   4: 83 for 401, gap 2.5e-01
          2: shapes      101 + 16  -        -        -      -
          all                      2.0e-05  3.4e-06  41.7%  gap 2.5e-01
          FAILED: probe 1: text alone: token 4 is 83, not 401: its logit is 0.25 lower
                  probe 2: shapes: no room""")


def test_a_run_that_never_came_to_a_table_tells_why() -> None:
    text = run_table(RankRun(2, "ray", error="load failed (rank 1): no such file"))
    assert text == "2 ranks, ray executor\n  FAILED: load failed (rank 1): no such file"


def test_no_probe_that_could_be_compared() -> None:
    text = run_table(RankRun(1, "inline", CheckReport(1e-3, (FAILED,))))
    assert "  all                  -      -     0 %    -\n" in text


def test_a_number_that_is_none_is_seen_in_the_last_line() -> None:
    odd = ProbeResult("3: odd", 9, 16, math.nan, 1e-6, num_agreed=16)
    last = run_table(RankRun(1, "inline", CheckReport(1e-3, (odd, SOUND)))).splitlines()[4]
    assert last.split()[:2] == ["all", "nan"]
