from __future__ import annotations

import contextlib
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
print(os.nice(0), autogroup.read_text() if autogroup.exists() else "")
"""


def _autogroup_niceness() -> str | None:
    """The niceness of this process's session, or None where the kernel tells none.

    The file reads "/autogroup-12 nice 0"; a kernel that has no groups in use shows it empty.
    """
    with contextlib.suppress(OSError):
        words = Path("/proc/self/autogroup").read_text().split()
        return words[-1] if words else None
    return None


_needs_autogroups = pytest.mark.skipif(_autogroup_niceness() is None, reason="the kernel tells of no autogroups")


def _run(*, is_leader: bool) -> list[str]:
    command = [sys.executable, "-c", _PROGRAM]
    return subprocess.run(
        command, start_new_session=is_leader, check=True, capture_output=True, text=True
    ).stdout.split()


def test_the_process_is_nicer() -> None:
    assert _run(is_leader=True)[0] == str(min(19, os.nice(0) + 7))


@_needs_autogroups
def test_so_is_its_own_session_where_sessions_share_the_cores() -> None:
    assert _run(is_leader=True)[-1] == "7"


@_needs_autogroups
def test_a_session_of_others_is_left_alone() -> None:
    assert _run(is_leader=False)[-1] == _autogroup_niceness()
