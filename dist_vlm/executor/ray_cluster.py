"""Where the ranks' Ray comes from: the one this process already uses, one to join, or a private one of our own."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import secrets
import shutil
import signal
import site
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, ClassVar

from dist_vlm.executor import semaphores
from dist_vlm.executor.base import StartError
from dist_vlm.executor.temp_folder import short_base
from dist_vlm.workers.failure import describe

_MIN_STORE_BYTES = 80 << 20
_MAX_STORE_BYTES = 2 << 30
# What a process takes to end that was told to.
_END_WAIT_S = 10.0

_log = logging.getLogger(__name__)


class RayCluster:
    """A connection to Ray. `close` ends what `connect` began and nothing else.

    A private Ray serves every engine of this process, and ends when the last of them has closed.

    private: whether this Ray was started here.
    temp_dir: the private Ray's directory (sockets, logs), removed by `close`.
    """

    _of_this_process: ClassVar[RayCluster | None] = None

    def __init__(self) -> None:
        self._owner: RayCluster | None = None
        self._num_users = 0
        self.private = False
        self.temp_dir: Path | None = None
        self._joined = False
        self._auth_before: dict[str, str | None] | None = None
        self._print_before: Any = None
        self._keeper: _Keeper | None = None

    def connect(self, address: str | None, *, num_cpus: int, use_gpus: bool, timeout_s: float) -> None:
        """Uses the initialised Ray of this process; else joins `address`; else starts a private Ray.

        address: None, "auto" or "host:port". With None the environment's RAY_ADDRESS counts, as everywhere in Ray.
        num_cpus: what a private Ray offers, whatever the machine has.
        Raises `StartError` at stage "ray".
        """
        address = address or os.environ.get("RAY_ADDRESS") or None
        import ray

        if ray.is_initialized():
            self._use(RayCluster._of_this_process)
            return
        try:
            if address in (None, "local"):
                self._start_private(num_cpus, use_gpus, timeout_s)
                RayCluster._of_this_process = self
                self._use(self)
            else:
                self._join(str(address), timeout_s)
        except StartError:
            raise
        except Exception as error:
            self.close()
            raise StartError("ray", describe(error)) from None

    @property
    def on_private(self) -> bool:
        """Whether the Ray in use is this process's private one, started here or by another engine."""
        return self._owner is not None

    def _use(self, owner: RayCluster | None) -> None:
        if owner is not None:
            owner._num_users += 1
            self._owner = owner

    def close(self) -> None:
        """Leaves Ray. A joined one is left alone; a private one ends with its last user. May be called twice."""
        if self._owner is not None:
            owner, self._owner = self._owner, None
            owner._num_users -= 1
            if owner._num_users == 0:
                RayCluster._of_this_process = None
                owner._end()
        elif self._num_users == 0:
            self._end()

    def _end(self) -> None:
        import ray

        if not (self.private or self._joined):
            return
        raylets = _raylets() if self.private else []
        # What Ray says about processes that it then ends itself is no news.
        with suppress(Exception):
            ray.shutdown()
        semaphores.remove_those_of(raylets, within_s=_END_WAIT_S)
        if self._keeper is not None:
            self._keeper.end()
            self._keeper = None
        if self._print_before is not None:
            worker: Any = importlib.import_module("ray._private.worker")
            worker.print_to_stdstream = self._print_before
            self._print_before = None
        if self._auth_before is not None:
            _set_auth(self._auth_before)
            self._auth_before = None
        if self.temp_dir is not None:
            shutil.rmtree(self.temp_dir, ignore_errors=True)
            self.temp_dir = None
        self.private = self._joined = False

    def _join(self, address: str, timeout_s: float) -> None:
        import ray

        if "://" in address:
            raise StartError(
                "ray", f"{address}: a Ray Client address cannot carry plans; give host:port of the cluster"
            )
        if address != "auto":
            _check_reachable(address, timeout_s)
        with _sigterm_kept(), _loopback_only() if _is_loopback(address) else nullcontext():
            self._joined = True
            self._keeper = _Keeper()
            self._keeper.call(ray.init, timeout_s, address=address, log_to_driver=False, logging_level=logging.ERROR)

    def _start_private(self, num_cpus: int, use_gpus: bool, timeout_s: float) -> None:
        import ray

        self.temp_dir = Path(tempfile.mkdtemp(prefix="dvlm-", dir=short_base()))
        self.private = True
        if not os.environ.get("RAY_AUTH_MODE"):
            self._auth_before = _set_auth(_new_token())
        with _sigterm_kept(), loopback(), _without_helpers():
            self._keeper = _Keeper()
            self._keeper.call(
                ray.init,
                timeout_s,
                address="local",
                num_cpus=num_cpus,
                # Ray counts the GPUs itself; where none is wanted it need not look.
                num_gpus=None if use_gpus else 0,
                object_store_memory=_store_bytes(),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(self.temp_dir),
            )
        self._log_errors_quietly()

    def _log_errors_quietly(self) -> None:
        """Ray prints a paragraph about each dead rank on the driver's output, which the executor tells in a line."""
        worker: Any = importlib.import_module("ray._private.worker")
        self._print_before = getattr(worker, "print_to_stdstream", None)
        if self._print_before is not None:
            worker.print_to_stdstream = lambda data, *_, **__: _log.debug("%s", " ".join(data.get("lines", [])))


class _Keeper:
    """A thread that starts Ray and lives as long as it: Ray's processes ask the kernel to be killed when the thread
    that started them ends, and the caller's may end at any time."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def call(self, function: Callable[..., Any], timeout_s: float, **arguments: Any) -> None:
        """Raises what `function` raises, and `StartError` if it is not done in time."""
        outcome: Future[None] = Future()

        def run() -> None:
            try:
                function(**arguments)
            except BaseException as error:
                outcome.set_exception(error)
                return
            outcome.set_result(None)
            self._ended.wait()

        thread = threading.Thread(target=run, name="ray-keeper", daemon=True)
        thread.start()
        try:
            outcome.result(timeout_s)
        except FutureTimeoutError:
            raise StartError("ray", f"Ray did not start or answer within {timeout_s:.0f} s") from None
        self._thread = thread

    def end(self) -> None:
        """Waits for the thread, unless it hangs in the call."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()


def _worker_environment() -> dict[str, str]:
    """What the processes of a private Ray inherit."""
    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # See `_loopback_only`.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Each rank sees every GPU and takes its own: ranks with one ordinal cannot share memory.
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    }
    root = import_root()
    if root is not None:
        variables["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return variables


@contextmanager
def loopback() -> Iterator[None]:
    """Ray that is started in here listens on 127.0.0.1 alone, and its processes can import this package."""
    with _environment(_worker_environment()), _loopback_only():
        yield


@contextmanager
def with_token() -> Iterator[None]:
    """Ray that is started in here asks for a token: the environment's, else one of its own."""
    before: dict[str, str | None] = {}
    if not os.environ.get("RAY_AUTH_MODE"):
        before = _set_auth(_new_token())
    try:
        yield
    finally:
        if before:
            _set_auth(before)


def _raylets() -> list[int]:
    """The process of the Ray that was started here; none where Ray does not say it where it does today."""
    with suppress(Exception):
        worker: Any = importlib.import_module("ray._private.worker")
        return [told.process.pid for told in worker._global_node.all_processes["raylet"]]
    return []


def _new_token() -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def import_root() -> str | None:
    """The directory to put on another process's path to import this package; None where it is installed."""
    root = str(Path(__file__).resolve().parents[2])
    installed = [*site.getsitepackages(), site.getusersitepackages()]
    return None if root in map(os.path.realpath, installed) else root


def _is_loopback(address: str) -> bool:
    """Whether a cluster that listens on this machine alone is meant; from another address it could not be reached."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "")
    return address.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]")


def _check_reachable(address: str, timeout_s: float) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise StartError("ray", f"ray_address = {address!r}: must be None, 'auto' or 'host:port'")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=max(0.1, min(timeout_s, 10.0))).close()
    except OSError as error:
        raise StartError("ray", f"no Ray answers at {address}: {describe(error)}") from None


def _store_bytes() -> int | None:
    """Size of the object store. None (Ray's choice) where shared memory is too small."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return None
    size = min(_MAX_STORE_BYTES, int(free * 0.8))
    return size if size >= _MIN_STORE_BYTES else None


def _set_auth(variables: dict[str, str | None] | dict[str, str]) -> dict[str, str | None]:
    """Sets Ray's authentication variables and makes Ray read them again. Returns what they were."""
    before = {name: os.environ.get(name) for name in variables}
    for name, value in variables.items():
        _set_variable(name, value)
    with suppress(Exception):  # Ray without token authentication has nothing to read again.
        raylet: Any = importlib.import_module("ray._raylet")
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
    return before


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            _set_variable(name, value)


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Lets Ray take 127.0.0.1 for its address, and listen there alone, in place of the network card's.

    Its processes read the variable; this process did while it imported Ray, so what it read is changed.
    """
    constants: Any = importlib.import_module("ray._private.ray_constants")
    before = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _without_helpers() -> Iterator[None]:
    """Starts Ray without its autoscaler, its forwarder of logs, and the process that a dashboard would be in, for which
    it waits even where there is to be none. Each takes a second of processor time; a private Ray has one node, and the
    ranks' output stays in their logs. Ray offers no public switch; where the private one is gone, they start."""
    parameter: Any = importlib.import_module("ray._private.parameter")
    node: Any = importlib.import_module("ray._private.node").Node
    before, start_dashboard = parameter.RayParams, getattr(node, "start_api_server", None)
    known = inspect.signature(before.__init__).parameters
    wanted = {"no_monitor": True, "include_log_monitor": False}
    lean = {name: value for name, value in wanted.items() if name in known}
    parameter.RayParams = lambda *args, **kwargs: before(*args, **(lean | kwargs))
    if start_dashboard is not None:
        node.start_api_server = lambda *_, **__: None
    try:
        yield
    finally:
        parameter.RayParams = before
        if start_dashboard is not None:
            node.start_api_server = start_dashboard


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """`ray.init` replaces the handler of SIGTERM. One that somebody set is put back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before not in (signal.SIG_DFL, None):
            signal.signal(signal.SIGTERM, before)
