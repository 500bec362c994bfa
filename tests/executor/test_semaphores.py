from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from dist_vlm.executor.semaphores import remove_those_of


def test_those_of_processes_that_have_ended_go_and_no_others(tmp_path: Path) -> None:
    killed, ended = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    killed.kill()
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    ended.kill()
    ended.wait()
    pids = [killed.pid, ended.pid, os.getpid()]
    gone = [f"sem.{kind}{pid}-123" for kind in ("hdr", "obj") for pid in pids[:2]]
    stay = [f"sem.hdr{os.getpid()}-1", "sem.hdr1-1", f"sem.mp{ended.pid}-1", f"sem.hdr{ended.pid}", f"hdr{ended.pid}-1"]
    for name in (*gone, *stay):
        (tmp_path / name).touch()
    began = time.monotonic()
    remove_those_of(pids, within_s=0.1, folder=tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(stay)
    assert time.monotonic() - began >= 0.1, "one of them lives on, and was waited for"
    killed.wait()
    remove_those_of(pids, within_s=0.0, folder=tmp_path / "nowhere")
