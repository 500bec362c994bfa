"""The head of a Ray cluster as an operator starts it: with a dashboard and a token, here on 127.0.0.1 alone."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dist_vlm.executor import semaphores

_START_S = 60.0


@dataclass(frozen=True)
class Head:
    """url: of the dashboard. token: the cluster's. pid: of the process that holds it all."""

    url: str
    token: str
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        """What a client of the cluster has set."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_API_SERVER_ADDRESS": self.url}


@contextmanager
def started(*, num_cpus: int) -> Iterator[Head]:
    token, port = secrets.token_hex(32), free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="rh-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # The interpreter that `python` is on the machines of a cluster, where nothing of this package is.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        environment.pop("PYTHONPATH", None)
        words = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1",
            f"--port={free_port()}", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={port}", f"--ray-client-server-port={free_port()}",
            # Its usual number may be another Ray's on this machine, and jobs are then never started.
            f"--dashboard-agent-listen-port={free_port()}",
            f"--num-cpus={num_cpus}", "--num-gpus=0", f"--temp-dir={folder}",
            f"--object-store-memory={200 << 20}", "--disable-usage-stats",
        ]  # fmt: skip
        with open(Path(folder) / "start.log", "wb") as log:
            head = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                cwd="/",
            )
        try:
            _await_answer(head, url)
            yield Head(url, token, head.pid)
        finally:
            pids = session_of(head.pid)
            head.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                head.wait(20)
            # What it started is in its session.
            for pid in session_of(head.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            head.kill()
            head.wait()
            semaphores.remove_those_of(pids, within_s=10)


def session_of(leader: int) -> list[int]:
    """The processes of a session, its leader apart."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader and int(entry.name) != leader and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _await_answer(head: subprocess.Popen[bytes], url: str) -> None:
    end = time.monotonic() + _START_S
    while True:
        assert head.poll() is None, "the head has ended"
        assert time.monotonic() < end, "the head does not answer"
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=5).close()
            return
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):  # it asks for its token
                return
        except OSError:
            pass
        time.sleep(0.2)
