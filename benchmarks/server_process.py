"""A server as a subprocess, with the processes that it started: what each is for, and what memory it has."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "demo.yaml"

_ENGINE, _PICTURES = "dist_vlm.engine.core_process", "dist_vlm.engine.picture_process"
_MEMORY = {"Rss": "rss", "Pss": "pss", "Private_Clean": "uss", "Private_Dirty": "uss"}
_POLL_S = 0.1
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_LOG_LINES = 30


class ServerProcess:
    """`dist-vlm serve` on a free port of 127.0.0.1. A context that ends all processes of it.

    flags: those of the command. start_s, end_s: what it may take to be ready, and to end after a SIGTERM.
    """

    def __init__(self, flags: Sequence[str], *, start_s: float, end_s: float = 60.0) -> None:
        self._flags = flags
        self._start_s, self._end_s = start_s, end_s
        self.port = _free_port()
        self._labels: dict[tuple[int, int], str] = {}
        self._log = tempfile.NamedTemporaryFile(prefix="server-", suffix=".log", delete=False)  # noqa: SIM115
        self.ready_s = 0.0

    def __enter__(self) -> ServerProcess:
        """Raises `RuntimeError` with the end of the server's log if it does not come up."""
        command = [sys.executable, "-m", "dist_vlm.launch.cli", "serve", "--host", "127.0.0.1"]
        began = time.monotonic()
        self._process = subprocess.Popen(
            [*command, "--port", str(self.port), *self._flags],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        try:
            self._await_ready(began + self._start_s)
        except BaseException:
            self._end()
            raise
        self.ready_s = time.monotonic() - began
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        code = self._end()
        if error is not None:
            print(f"the server's log: {self._log.name}", file=sys.stderr)
            return
        if code != 0:
            raise RuntimeError(f"the server ended with {code}: {self._tail()}")
        self._log.close()
        os.unlink(self._log.name)

    def processes(self) -> dict[str, int]:
        """What each process is for -> its id: "api", "engine", "pictures 0", "rank 0", and Ray's own.

        One that took another's place gets the next number.
        """
        for pid, began in sorted(self._members(), key=lambda member: (member[1], member[0])):
            if (pid, began) not in self._labels:
                role = "api" if pid == self._process.pid else _role(pid)
                self._labels[pid, began] = self._numbered(role)
        alive = self._members()
        return {label: member[0] for member, label in self._labels.items() if member in alive}

    def _numbered(self, role: str) -> str:
        if role not in ("pictures", "rank") and role not in self._labels.values():
            return role
        taken = sum(label.rpartition(" ")[0] == role for label in self._labels.values())
        return f"{role} {taken}"

    def _members(self) -> set[tuple[int, int]]:
        """Id and start of the server's process and of all that come from it: children, and who shares a session with
        one of them, since those that Ray starts outlive their parents."""
        table = {pid: stat for pid in _all_pids() if (stat := _stat(pid)) is not None and stat["state"] != "Z"}
        found, sessions = {self._process.pid} & table.keys(), {self._process.pid}
        while True:
            more = {
                pid for pid, stat in table.items() if stat["parent"] in found or stat["session"] in sessions
            } - found
            if not more:
                return {(pid, table[pid]["began"]) for pid in found}
            found |= more
            sessions |= {table[pid]["session"] for pid in more}

    def _await_ready(self, end: float) -> None:
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with {self._process.returncode}: {self._tail()}")
            with suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5).close()
                return
            time.sleep(_POLL_S)
        raise RuntimeError(f"the server was not ready after {self._start_s:g} s: {self._tail()}")

    def _end(self) -> int:
        """SIGTERM, then SIGKILL for all that are left. The exit status."""
        members = self._members()
        if self._process.poll() is None:
            self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(self._end_s)
        members |= self._members()
        for pid, began in members:
            if (stat := _stat(pid)) is not None and stat["began"] == began and stat["state"] != "Z":
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return self._process.wait()

    def _tail(self) -> str:
        lines = Path(self._log.name).read_text(errors="replace").splitlines()
        return "\n".join(["", *lines[-_LOG_LINES:], f"(all of it: {self._log.name})"])


def end_with_parent() -> None:
    """Has this process, a child, get a SIGTERM when its parent dies, however that ends."""
    if _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError("prctl refused PR_SET_PDEATHSIG")


def memory_of(pid: int) -> dict[str, int]:
    """Bytes: rss, pss (a page that several share counts in parts), uss (pages that nobody else has); threads,
    descriptors. Raises `OSError` if there is no such process."""
    found = dict.fromkeys(_MEMORY.values(), 0)
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, kib = line.split(":")[0], line.split()[1]
        if name in _MEMORY:
            found[_MEMORY[name]] += 1024 * int(kib)
    found["threads"] = len(os.listdir(f"/proc/{pid}/task"))
    found["descriptors"] = len(os.listdir(f"/proc/{pid}/fd"))
    return found


def gpu_memory() -> dict[str, int]:
    """ "gpu 0" -> bytes in use, of whatever process, in MiB; of each GPU that the driver lists and CUDA_VISIBLE_DEVICES
    lets this process use. Empty without one."""
    smi, visible = shutil.which("nvidia-smi"), os.environ.get("CUDA_VISIBLE_DEVICES")
    if smi is None or (visible is not None and visible.split(",")[0].strip() in ("", "-1")):
        return {}
    words = [smi, "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
    if visible is not None:
        words.append(f"--id={visible}")
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    rows = (line.split(",") for line in done.stdout.splitlines())
    return {f"gpu {int(index)}": int(mib) << 20 for index, mib in rows}


def machine() -> dict[str, Any]:
    """What it ran on, and of which versions."""
    match = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    packages = ("torch", "transformers", "ray", "fastapi", "uvicorn", "pillow")
    return {
        "processor": match[1] if match else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "load_average": round(os.getloadavg()[0], 2),
        "commit": _commit(),
        "software": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
    }


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help=f"YAML file of the server ({CONFIG.relative_to(ROOT)} without --model)")
    parser.add_argument("--model", help="checkpoint, in place of the configuration's")
    parser.add_argument("--executor", choices=("inline", "ray"), default="inline")
    parser.add_argument("--ranks", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--flag", action="append", default=[], metavar="TEXT", help="one more of `dist-vlm serve`: a=b")
    parser.add_argument("--start-s", type=float, default=300, help="what the server may take to be ready")


def server_flags(arguments: argparse.Namespace) -> list[str]:
    """Flags of `dist-vlm serve`."""
    flags = ["--executor", arguments.executor, "--tensor-parallel-size", str(arguments.ranks)]
    config = arguments.config or (None if arguments.model else str(CONFIG))
    for name, path in (("--config", config), ("--model", arguments.model)):
        if path is not None:
            flags += [name, os.path.abspath(path)]
    return flags + [f"--{flag.removeprefix('--')}" for flag in arguments.flag]


def _role(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return "ended"
    if _ENGINE in words:
        return "engine"
    if _PICTURES in words:
        return "pictures"
    if words[0].startswith("ray::"):
        return "rank" if words[0].startswith("ray::Worker") else words[0].split()[0]
    script = next((word for word in words[1:] if word.endswith(".py")), words[0])
    return "ray " + os.path.basename(script)


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _stat(pid: int) -> dict[str, Any] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return {"state": fields[0], "parent": int(fields[1]), "session": int(fields[3]), "began": int(fields[19])}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if git("status", "--porcelain") else "")
