"""Semaphores of Ray's compiled graphs, in /dev/shm: the raylet makes and removes them, unless it is killed before."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

_FOLDER = Path("/dev/shm")
_NAME = re.compile(r"sem\.(?:hdr|obj)(\d+)-\d+")
_POLL_S = 0.02


def remove_those_of(pids: Collection[int], *, within_s: float, folder: Path = _FOLDER) -> None:
    """Removes what processes of this machine have left that are being ended; waits so long for their ends. Those of one
    that lives on stay. Raises nothing."""
    end = time.monotonic() + within_s
    while (alive := set(filter(_is_alive, pids))) and time.monotonic() < end:
        time.sleep(_POLL_S)
    with suppress(OSError):
        for name in os.listdir(folder):
            found = _NAME.fullmatch(name)
            if found is not None and int(found[1]) in pids and int(found[1]) not in alive:
                with suppress(OSError):
                    os.unlink(folder / name)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state != "Z"
