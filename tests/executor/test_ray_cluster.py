"""A private Ray: reachable from this machine alone, and gone with its owner. Each runs in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from processes import is_running, named_after

from dist_vlm.executor import ray_cluster
from dist_vlm.executor.base import StartError
from dist_vlm.executor.ray_cluster import RayCluster

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent

START = """
import json, os, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
import dist_vlm
from processes import descendants, listening_on
from stand_in import RUNNER, rank_config
from dist_vlm.executor.base import ExecutorError
from dist_vlm.executor.ray import RayExecutor
from dist_vlm.workers.plan import Slice, StepPlan

def tell(**facts):
    print(json.dumps(facts), flush=True)

signal.signal(signal.SIGTERM, handler := lambda *_: sys.exit(9))
executor = RayExecutor(rank_config(2, json.loads(sys.argv[1])), runner=RUNNER, start_timeout_s=90)
try:
    # In a thread that ends at once: Ray must not end with it.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(executor.start).result()
except ExecutorError as error:
    tell(error=str(error), children=len(descendants(os.getpid())))
    sys.exit(3)
executor.submit(StepPlan(0, slices=(Slice(1, 5, 1, (), True),)))
token = executor.collect().sampled[0].token_ids[0]
children = descendants(os.getpid())
tell(
    token=token,
    package=dist_vlm.__file__,
    pids=children,
    ranks=[result.counters.busy_us for result in executor.last_results],
    listeners=listening_on([os.getpid(), *children]),
    temp_dir=str(executor._cluster.temp_dir),
    token_auth=os.environ["RAY_AUTH_MODE"],
    handler_kept=signal.getsignal(signal.SIGTERM) is handler,
)
"""

# Where a rank was lost and others are being started, the executor is shut down by another thread.
RESTART = """
import json, os, sys, threading, time
import ray
from processes import descendants
from stand_in import RUNNER, rank_config
from dist_vlm.executor import ray as module
from dist_vlm.executor.base import ExecutorError

executor = module.RayExecutor(rank_config(2), runner=RUNNER, start_timeout_s=60)
executor.start()
children = descendants(os.getpid())
os.kill(ray.get(executor._actors[1].ping.remote()), 9)
try:
    while True:
        executor.check()
        time.sleep(0.02)
except ExecutorError:
    pass
reached, create = threading.Event(), module.create_actors

def slowly(*arguments, **named):
    reached.set()
    if sys.argv[2] == "before":
        time.sleep(1)
    made = create(*arguments, **named)
    if sys.argv[2] == "after":
        time.sleep(1)
    return made

module.create_actors = slowly
told = []

def restart():
    try:
        executor.restart()
    except ExecutorError as error:
        told.append(str(error))

thread = threading.Thread(target=restart)
thread.start()
reached.wait()
time.sleep(float(sys.argv[3]))
executor.shutdown()
thread.join(20)
print(json.dumps({
    "told": told, "is_over": not thread.is_alive(), "has_ray": ray.is_initialized(), "pids": children,
    "left": len(descendants(os.getpid())), "threads": [one.name for one in threading.enumerate()],
}), flush=True)
os._exit(0)
"""

TWO = """
from stand_in import RUNNER, rank_config
from dist_vlm.executor.ray import RayExecutor
from dist_vlm.workers.plan import Slice, StepPlan

first, second = (RayExecutor(rank_config(2), runner=RUNNER, start_timeout_s=60) for _ in range(2))
first.start()
second.start()
first.shutdown()
second.submit(StepPlan(0, slices=(Slice(1, 5, 1, (), True),)))
print(len(second.collect().sampled))
second.shutdown()
import ray
print(ray.is_initialized())
"""

KILL = """
import json, os, signal, sys, threading, time
from processes import descendants, shared_memory_of
from stand_in import RUNNER, rank_config
from dist_vlm.executor.base import ExecutorError
from dist_vlm.executor.ray import RayExecutor
from dist_vlm.workers.plan import Slice, StepPlan

wanted = json.loads(sys.argv[1])
model = {"collective": True, "work_s": 0.01}
executor = RayExecutor(rank_config(2, model), runner=RUNNER, transport=wanted["transport"], start_timeout_s=90)
executor.start()

def plan(step_id):
    return StepPlan(step_id, slices=(Slice(1, 5, 1, (), True),))

executor.submit(plan(0))
executor.submit(plan(1))
executor.collect()
pid = executor.last_results[wanted["rank"]].counters.busy_us
children = descendants(os.getpid())
shared = shared_memory_of([os.getpid(), *children])
killed_at = []

def kill():
    time.sleep(0.3)
    killed_at.append(time.monotonic())
    os.kill(pid, signal.SIGKILL)

threading.Thread(target=kill).start()
step_id = 2
while True:
    try:
        executor.submit(plan(step_id))
        executor.collect()
    except ExecutorError as raised:
        error = raised
        noticed_s = time.monotonic() - killed_at[0]
        break
    step_id += 1
executor.shutdown()
print(json.dumps({
    "error": str(error), "rank": error.rank, "noticed_s": noticed_s, "steps": step_id, "ranks_pid": pid,
    "pids": children, "shared": sorted(shared), "threads": [thread.name for thread in threading.enumerate()],
}), flush=True)
sys.stdin.read()
"""


def run(
    code: str,
    model: dict[str, Any] | None = None,
    *,
    cwd: Path = ROOT,
    stdin: int | None = None,
    arguments: tuple[str, ...] = (),
    **environment: str,
) -> subprocess.Popen[str]:
    env = os.environ | environment
    env.pop("RAY_AUTH_TOKEN", None)
    command = [sys.executable, "-c", code, json.dumps(model or {}), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=env, stdin=stdin, stdout=pipe, stderr=pipe, text=True)


def facts_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    facts: dict[str, Any] = json.loads(line)
    return facts


def assert_gone(pids: list[int], within_s: float = 20.0) -> None:
    end = time.monotonic() + within_s
    left = pids
    while left and time.monotonic() < end:
        left = [pid for pid in left if is_running(pid)]
        time.sleep(0.05)
    assert not left, [command_of(pid) for pid in left]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()[:120]
    except OSError:
        return ""


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "plasma" in name or "ray" in name}


@pytest.mark.parametrize(("slow", "wait_s"), [("before", 0.2), ("after", 0.2), ("not", 0.6)])
def test_a_shutdown_amid_a_restart_leaves_no_ray(slow: str, wait_s: float) -> None:
    """Any call of a Ray that was shut down would start another one, which nobody ends."""
    process = run(RESTART, PYTHONPATH=f"{HERE}{os.pathsep}{ROOT}", arguments=(slow, str(wait_s)))
    facts = facts_of(process)
    process.communicate(timeout=60)
    assert (facts["is_over"], facts["has_ray"], facts["left"]) == (True, False, 0)
    assert facts["threads"] == ["MainThread"]
    # A restart that nothing slows may be through before.
    assert len(facts["told"]) == 1 or (slow == "not" and not facts["told"])
    assert_gone(facts["pids"])


def test_two_engines_of_a_process_share_it_and_the_last_ends_it() -> None:
    out, errors = run(TWO, PYTHONPATH=f"{HERE}{os.pathsep}{ROOT}").communicate(timeout=90)
    assert out == "1\nFalse\n", errors


def test_it_listens_on_loopback_alone_and_ends_with_a_program_that_forgets_it(tmp_path: Path) -> None:
    before = shared_memory()
    # No shutdown() in the program: the interpreter's exit does it. A second copy of the package, found through the
    # working directory alone, stands for a checkout that is not installed.
    for name in ("dist_vlm", "workers", "kernels", "launch"):
        subprocess.run(["cp", "-a", str(ROOT / name), str(tmp_path / name)], check=True)
    process = run(START, {"collective": True}, cwd=tmp_path, PYTHONPATH=str(HERE))
    facts = facts_of(process)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert (out, errors) == ("", "")
    assert facts["package"].startswith(str(tmp_path))
    assert facts["token"] == 1000 + 6 + 3
    assert facts["token_auth"] == "token"
    assert facts["handler_kept"]
    assert len(facts["listeners"]) >= 5
    assert {ip.removeprefix("::ffff:") for ip in facts["listeners"]} == {"127.0.0.1"}
    assert len(facts["pids"]) >= 4
    assert_gone(facts["pids"])
    assert not Path(facts["temp_dir"]).exists()
    assert shared_memory() <= before


def test_no_rank_outlives_a_driver_that_is_killed() -> None:
    before = shared_memory()
    process = run(START + "\ntime.sleep(600)\n")
    facts = facts_of(process)
    process.kill()
    process.wait(10)
    # What else Ray started may look for its peers for a minute before it ends; it holds no model and no GPU.
    servers = [pid for pid in facts["pids"] if "gcs_server" in command_of(pid) or "raylet/raylet" in command_of(pid)]
    assert_gone([*facts["ranks"], *servers], within_s=20.0)
    assert shared_memory() <= before
    for pid in filter(is_running, facts["pids"]):
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(facts["temp_dir"])
    # Semaphores of a compiled graph, some bytes each: nobody is left to remove them.
    for name in named_after([process.pid, *facts["pids"]]):
        Path("/dev/shm", name).unlink()


@pytest.mark.parametrize(("transport", "rank"), [("direct", 0), ("ray", 1)])
def test_a_killed_rank_is_told_in_time_and_shutdown_leaves_nothing_of_it(transport: str, rank: int) -> None:
    """Two steps are in flight at any moment. The program lives on after its shutdown()."""
    # Short, or Ray's sockets would not fit under it and the directory would be another.
    temp = Path(tempfile.mkdtemp(prefix="k-", dir="/tmp"))
    before = set(os.listdir("/dev/shm"))  # processes of other times may have had the same numbers
    wanted = {"transport": transport, "rank": rank}
    path = f"{HERE}{os.pathsep}{ROOT}"
    process = run(KILL, wanted, stdin=subprocess.PIPE, PYTHONPATH=path, TMPDIR=str(temp))
    try:
        facts = facts_of(process)
        assert facts["error"].startswith(f"step failed (rank {rank}): its process died")
        assert facts["rank"] == rank
        assert facts["noticed_s"] < 2.0
        assert facts["steps"] > 3, "it was killed amid steps"
        assert facts["ranks_pid"] in facts["pids"]
        assert len(facts["pids"]) >= 4
        assert_gone(facts["pids"])
        left = {name for name in facts["shared"] if Path("/dev/shm", name).exists()}
        # Those of other programs are none of ours: semaphores have their maker's number in their names.
        assert not left | named_after([process.pid, *facts["pids"]]) - before
        assert list(temp.iterdir()) == []
        assert facts["threads"] == ["MainThread"]
    finally:
        out, errors = process.communicate(timeout=60)
        shutil.rmtree(temp)
    assert (process.returncode, out) == (0, "")
    # What the log says, and no more.
    assert [line.partition(": its process died")[0] for line in errors.splitlines()] == [
        f"rank {rank}",
        f"step failed (rank {rank})",
    ]


def test_a_start_that_fails_tells_one_line_and_leaves_no_process() -> None:
    process = run(START, {"fault": {"rank": 1, "at": "load", "do": "raise"}})
    facts = facts_of(process)
    out, errors = process.communicate(timeout=60)
    assert facts["error"] == "load failed (rank 1): FileNotFoundError: no model.safetensors in /nowhere"
    assert facts["children"] == 0
    assert process.returncode == 3
    assert (out, errors) == ("", "")


def test_a_cluster_that_is_not_there_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(StartError, match=f"no Ray answers at 127.0.0.1:{port}: ConnectionRefusedError") as caught:
        RayCluster().connect(f"127.0.0.1:{port}", num_cpus=1, use_gpus=False, timeout_s=30)
    assert caught.value.stage == "ray"
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize(
    ("address", "problem"),
    [("ray://127.0.0.1:10001", "Ray Client address"), ("here", "must be None, 'auto' or 'host:port'")],
)
def test_an_address_of_another_kind_is_refused(address: str, problem: str) -> None:
    with pytest.raises(StartError, match=problem):
        RayCluster().connect(address, num_cpus=1, use_gpus=False, timeout_s=30)


def test_an_installed_package_needs_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray_cluster.import_root() == str(ROOT)
    monkeypatch.setattr(ray_cluster.site, "getsitepackages", lambda: [str(ROOT)])
    assert ray_cluster.import_root() is None
