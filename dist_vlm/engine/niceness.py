"""Lets a process run behind others."""

from __future__ import annotations

import contextlib
import os

_AUTOGROUP = "/proc/self/autogroup"


def run_behind(niceness: int) -> None:
    """Makes this process, the leader of a session of its own, give way to others.

    niceness: 1 to 19. Where Linux shares the cores among sessions (`sched_autogroup_enabled`), a process's own niceness
    counts inside its session alone, so the session gets it too.
    """
    os.nice(niceness)
    if os.getsid(0) == os.getpid():
        # There is no such file without autogroups, and in a sandbox it may not be written.
        with contextlib.suppress(OSError), open(_AUTOGROUP, "w", encoding="ascii") as autogroup:
            autogroup.write(str(niceness))
