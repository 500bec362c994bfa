from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
from pathlib import Path
from dist_vlm.engine.niceness import run_behind
run_behind(7)
import os
autogroup = Path("/proc/self/autogroup")
print(os.nice(0), autogroup.read_text().split()[-1] if autogroup.exists() else None)
"""
_HAS_AUTOGROUPS = Path("/proc/self/autogroup").exists()


def _run(*, is_leader: bool) -> list[str]:
    command = [sys.executable, "-c", _PROGRAM]
    return subprocess.run(
        command, start_new_session=is_leader, check=True, capture_output=True, text=True
    ).stdout.split()


def test_the_process_is_nicer() -> None:
    assert _run(is_leader=True)[0] == str(min(19, os.nice(0) + 7))


@pytest.mark.skipif(not _HAS_AUTOGROUPS, reason="the kernel was built without autogroups")
def test_so_is_its_own_session_where_sessions_share_the_cores() -> None:
    assert _run(is_leader=True)[1] == "7"


@pytest.mark.skipif(not _HAS_AUTOGROUPS, reason="the kernel was built without autogroups")
def test_a_session_of_others_is_left_alone() -> None:
    before = Path("/proc/self/autogroup").read_text().split()[-1]
    assert _run(is_leader=False)[1] == before
