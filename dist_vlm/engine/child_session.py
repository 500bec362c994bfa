"""The end of a child process that leads a session of its own, and of all that it started there."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress

_POLL_S = 0.005


def reap(process: subprocess.Popen[bytes], timeout_s: float) -> int | None:
    """The exit code of a child started with `start_new_session`, None if it has not ended in time.

    What it left behind in its session is killed: not all of Ray's processes end by themselves when the one that started
    them is killed. Not for use from several threads.
    """
    end = time.monotonic() + timeout_s
    while process.returncode is None and not _has_ended(process.pid):
        if time.monotonic() > end:
            return None
        time.sleep(_POLL_S)
    if process.returncode is None:
        # The session has the child's number, which is not given to another while the child is not reaped.
        _kill_session(process.pid)
    return process.wait()


def _has_ended(pid: int) -> bool:
    """Whether a child has ended; it is not reaped by this."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # reaped by someone else
        return True


def _kill_session(session: int) -> None:
    """Kills every process of a session, those that they start meanwhile too, but for the session's leader."""
    killed: set[int] = set()
    while left := set(_members(session)) - killed - {session}:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= left


def _members(session: int) -> Iterator[int]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as stat:
                    # Behind the name, which may hold anything: state, parent, group, session.
                    fields = stat.read().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            if fields[0] != "Z" and int(fields[3]) == session:
                yield int(entry)
