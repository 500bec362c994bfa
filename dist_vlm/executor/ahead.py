"""Starts the process that compiles the ranks' kernels while Ray starts. What it leaves is a cache: nothing waits for
it, and nothing depends on it."""

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

MODULE = "dist_vlm.workers.compile_ahead"
# Of what a process that failed has written, the end.
_TOLD_CHARS = 4000

_log = logging.getLogger(__name__)


def is_wanted(config: RankConfig, *, ray_address: str | None) -> bool:
    """Whether the ranks' kernels can be compiled here: Triton's, for ranks on this machine."""
    here = (ray_address or os.environ.get("RAY_ADDRESS") or "local") == "local"
    return here and config.device == "cuda" and config.kernels == "triton" and not triton_interpreted()


def command(config: RankConfig) -> list[str]:
    return [sys.executable, "-m", MODULE, json.dumps(dataclasses.asdict(config))]


class AheadCompiler:
    """A process in a session of its own, so that `stop` ends those it has started too. Raises nothing."""

    def __init__(self, words: Sequence[str]) -> None:
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
            _log.warning("kernels are not compiled ahead: %s", describe(error))
            return
        self._thread = threading.Thread(target=self._await, args=(self._process,), name="compile-ahead", daemon=True)
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
            _log.warning("kernels were not compiled ahead (status %d), the ranks do it: %s", process.returncode, text)
        elif not self._stopped:
            _log.info("kernels are compiled ahead")


def _environment() -> dict[str, str]:
    root, variables = import_root(), dict(os.environ)
    if root is not None:
        variables["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return variables
