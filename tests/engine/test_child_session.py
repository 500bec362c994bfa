"""A child that ends takes with it what it started, however deep and in whatever group."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_vlm.engine.child_session import reap

# The child starts one that stays, one in a group of its own, and one whose parent ends at once, and tells their ids.
FAMILY = """
import subprocess, sys, time
stays = subprocess.Popen(["sleep", "60"])
grouped = subprocess.Popen(["sleep", "60"], process_group=0)
orphan = subprocess.run(
    ["sh", "-c", "sleep 60 > /dev/null & echo $!"], stdout=subprocess.PIPE, text=True, check=True
).stdout
print(stays.pid, grouped.pid, int(orphan), flush=True)
time.sleep(60)
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, start_new_session=True)
    with started:
        yield started
        started.kill()


def family_of(child: subprocess.Popen[bytes]) -> list[int]:
    assert child.stdout is not None
    return [int(word) for word in child.stdout.readline().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_child_takes_its_session_with_it_and_nothing_else(child: subprocess.Popen[bytes]) -> None:
    family = family_of(child)
    assert all(map(is_running, family))
    assert reap(child, 0.05) is None, "it has not ended"
    assert all(map(is_running, family))
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as stranger:
        os.kill(child.pid, signal.SIGKILL)
        assert reap(child, 5) == -signal.SIGKILL
        end = time.monotonic() + 2
        while any(map(is_running, family)):
            assert time.monotonic() < end, "one is left behind"
            time.sleep(0.01)
        assert is_running(stranger.pid)
        stranger.kill()
    assert reap(child, 0) == -signal.SIGKILL, "and again"


def test_the_exit_code_of_one_that_ends_by_itself() -> None:
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"], start_new_session=True) as child:
        assert reap(child, 10) == 7
