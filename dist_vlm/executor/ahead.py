"""Starts the processes that work ahead of the ranks while Ray starts: one compiles their kernels, one has the system
read what they will import. What they leave is caches: nothing waits for them, and nothing depends on them."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

from dist_vlm.executor.ray_cluster import import_root
from dist_vlm.kernels.triton_support import triton_interpreted
from dist_vlm.workers.config import RankConfig
from dist_vlm.workers.failure import describe

COMPILING, READING = "dist_vlm.workers.compile_ahead", "dist_vlm.workers.read_ahead"
# Of what a process that failed has written, the end.
_TOLD_CHARS = 4000

_log = logging.getLogger(__name__)


def is_wanted(config: RankConfig, *, ray_address: str | None) -> bool:
    """Whether the ranks' kernels can be compiled here: Triton's, for ranks on this machine."""
    return reads(config, ray_address=ray_address) and config.kernels == "triton" and not triton_interpreted()


def reads(config: RankConfig, *, ray_address: str | None) -> bool:
    """Whether it is worth to read ahead: for ranks on this machine that take a GPU, with the libraries for that."""
    return (ray_address or os.environ.get("RAY_ADDRESS") or "local") == "local" and config.device == "cuda"


def command(config: RankConfig) -> list[str]:
    return [sys.executable, "-m", COMPILING, json.dumps(dataclasses.asdict(config))]


def reading_command() -> list[str]:
    return [sys.executable, "-m", READING, str(os.getpid())]


class AheadProcess:
    """A process in a session of its own, so that `stop` ends those it has started too. Raises nothing.

    task: what it does, for the log.
    """

    def __init__(self, words: Sequence[str], task: str = "compiling kernels ahead") -> None:
        self._task = task
        self._stopped = False
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        try:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=_environment(),
                start_new_session=True,
            )
        except OSError as error:
            _log.warning("%s: it cannot be started: %s", task, describe(error))
            return
        self._thread = threading.Thread(target=self._await, args=(self._process,), name="ahead", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """Ends the process if it still runs."""
        self._stopped = True
        if self._process is None or self._thread is None:
            return
        if self.is_running:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._thread.join()

    def _await(self, process: subprocess.Popen[bytes]) -> None:
        """In a thread: reads to the end of what the process and those it has started write."""
        _, told = process.communicate()
        if process.returncode and not self._stopped:
            text = told.decode(errors="replace").strip()[-_TOLD_CHARS:]
            _log.warning("%s failed (status %d), the ranks go without: %s", self._task, process.returncode, text)
        elif not self._stopped:
            _log.info("%s is done", self._task)


def _environment() -> dict[str, str]:
    root, variables = import_root(), dict(os.environ)
    if root is not None:
        variables["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return variables
