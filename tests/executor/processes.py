"""What /proc tells of processes, of the sockets they listen on and of the memory they share."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterable
from pathlib import Path

_LISTEN = "0A"


def is_running(pid: int) -> bool:
    """Whether there is such a process, one that waits to be reaped not counted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def stop(pid: int) -> None:
    """Stops a process, all its threads: each does so when the kernel next comes by it."""
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + 10
    while {path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")} != {
        "T"
    }:
        assert time.monotonic() < end, f"process {pid} does not stop"
        time.sleep(0.001)


def descendants(pid: int) -> list[int]:
    """Children of `pid`, their children, and so on, as of now."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and is_running(int(entry)):
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    found = [pid]
    for candidate in found:
        found += [child for child, parent in parents.items() if parent == candidate]
    return found[1:]


def listening_on(pids: list[int]) -> list[str]:
    """The IP addresses on which any of `pids` listens for TCP, one for each socket."""
    inodes = {inode for pid in pids for inode in _socket_inodes(pid)}
    addresses = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and fields[9] in inodes:
                words = bytes.fromhex(fields[1].partition(":")[0])
                # Each 32-bit word is in the machine's own order, little endian.
                packed = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                addresses.append(socket.inet_ntop(family, packed))
    return addresses


def _socket_inodes(pid: int) -> list[str]:
    inodes = []
    try:
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(f"/proc/{pid}/fd/{descriptor}")
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.append(target[len("socket:[") : -1])
    except OSError:
        pass
    return inodes


def shared_memory_of(pids: Iterable[int]) -> set[str]:
    """Names in /dev/shm that any of `pids` has mapped or open."""
    names: set[str] = set()
    for pid in pids:
        targets = []
        try:
            targets += [line.split(maxsplit=5)[5] for line in _maps(pid) if "/dev/shm/" in line]
            targets += [os.readlink(f"/proc/{pid}/fd/{descriptor}") for descriptor in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            pass
        names |= {target.removeprefix("/dev/shm/") for target in targets if target.startswith("/dev/shm/")}
    return {name for name in names if not name.endswith(" (deleted)")}


def named_after(pids: Iterable[int]) -> set[str]:
    """Names in /dev/shm that contain the number of one of `pids`, as those of semaphores do."""
    numbers = set(map(str, pids))
    return {name for name in os.listdir("/dev/shm") if numbers & set(re.findall(r"\d+", name))}


def _maps(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/maps").read_text().splitlines()
