"""One rank as a plain class: what a Ray actor, or the driver itself, calls in order to start and run it.

Importing this module costs neither torch nor the model; `prepare` pays for them, on every rank at once.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dist_vlm.version import __version__
from dist_vlm.workers import wire
from dist_vlm.workers.allocator import give_freed_memory_back, keep_freed_memory
from dist_vlm.workers.config import RankConfig
from dist_vlm.workers.failure import RankError, describe
from dist_vlm.workers.pending import FinishedSteps, PendingStep
from dist_vlm.workers.plan import StepPlan
from dist_vlm.workers.read_ahead import hold_gpu

if TYPE_CHECKING:
    import numpy as np

    from dist_vlm.workers.comm import Communicator

RUNNER = "dist_vlm.workers.runner:Runner"

_log = logging.getLogger(__name__)


class Worker:
    """A rank, started in stages: `prepare`, `join` where there are several ranks, `load`, `allocate`.

    Whatever fails raises `RankError`, its traceback having gone to the log. `stage`, `unstage`, `progress`,
    `ping` and `watch` may be called from other threads while a step runs.

    config: a `RankConfig`, encoded.
    runner: "module:name" of what makes the runner from (config, communicator). Its `preload(config)`, if it has
        one, imports what loading needs.
    """

    def __init__(self, config: bytes, runner: str = RUNNER) -> None:
        self._config = wire.decode(RankConfig, config)
        self._runner_name = runner
        self._thread = threading.local()
        self._comm: Communicator | None = None
        self._store: Any = None
        self._runner: Any = None
        self._gpu = 0
        self._prepare_seconds: dict[str, float] = {}
        self._pending: deque[PendingStep] = deque()
        self._last_step = -1

    @property
    def rank(self) -> int:
        return self._config.rank

    def prepare(self, host: str, timeout_s: float) -> tuple[str, int]:
        """Imports the runner and takes the device. Returns (version of this package, rendezvous port).

        The port, on `host`, is rank 0's where there are several ranks; otherwise 0.
        """
        config = self._config
        if config.device == "cuda":
            # Beside the imports: with a driver that nobody has open, it can take as long as they do.
            threading.Thread(target=hold_gpu, name="hold-gpu", daemon=True).start()
        with self._stage_named("import"):
            with self._timed("runner"):
                module, _, name = self._runner_name.partition(":")
                self._make_runner: Callable[..., Any] = getattr(import_module(module), name)
            with self._timed("model"):
                if hasattr(self._make_runner, "preload"):
                    self._make_runner.preload(config)
                from dist_vlm.workers import comm
        with self._stage_named("device"), self._timed("device"):
            if config.device == "cuda":
                self._gpu = _gpu_ordinal()
            self._enter_thread()
            if config.device == "cuda":
                from dist_vlm.workers.free_memory import await_release

                # Here the driver waits for all ranks; later they wait for one another.
                await_release(config)
        if config.world_size == 1:
            self._comm = comm.single_rank()
            return __version__, 0
        if config.rank != 0:
            return __version__, 0
        with self._stage_named("join"):
            self._store = comm.host_store(host, config.world_size, timeout_s)
            return __version__, int(self._store.port)

    def prepare_seconds(self) -> dict[str, float]:
        """What the parts of `prepare` took: importing the "runner" and the "model", taking the "device"."""
        return dict(self._prepare_seconds)

    def join(self, host: str, port: int, timeout_s: float, wait_s: float) -> None:
        """Joins the tensor-parallel group whose rendezvous is at host:port; all ranks are on one machine.

        timeout_s: how long to wait for the others, here and in any later collective of the process group.
        wait_s: in any other collective; less than the driver waits for a step, so that a rank that is missed is named.
        """
        config = self._config
        with self._stage_named("join"):
            from dist_vlm.workers import comm

            self._enter_thread()
            if self._store is None:
                self._store = comm.join_store(host, port, config.world_size, timeout_s)
            backend = "nccl" if config.device == "cuda" and not config.share_gpu else "gloo"
            self._comm = comm.join_group(
                self._store,
                rank=config.rank,
                world_size=config.world_size,
                backend=backend,
                timeout_s=timeout_s,
                host=host,
            )
            from dist_vlm.workers.open_collectives import open_collectives

            open_collectives(config, self._comm, self._store, wait_s=wait_s)

    def load(self) -> bytes:
        """Builds the runner and loads the model. Returns an encoded `LoadReport`."""
        with self._stage_named("load"):
            self._enter_thread()
            if self._config.device == "cpu":
                give_freed_memory_back()  # a loaded matrix is copied into another order, and then freed
            self._runner = self._make_runner(self._config, self._comm)
            return wire.encode(self._runner.load())

    def allocate(self, num_blocks: int) -> None:
        """Allocates the KV cache: the same number of blocks on every rank."""
        with self._stage_named("allocate"):
            self._enter_thread()
            self._runner.allocate(num_blocks)
            if self._comm is not None:
                self._comm.check()  # the runner may have made collectives
        if self._config.device == "cpu":
            keep_freed_memory()  # from here on: what loading freed is not wanted back

    def stage(self, key: str, kind: str, array: np.ndarray) -> None:
        """Takes an image. `array` may be read-only memory shared with other ranks."""
        with self._stage_named("stage"):
            self._enter_thread(computes=False)
            self._runner.stage(key, kind, array)

    def unstage(self, key: str) -> None:
        with self._stage_named("unstage"):
            if self._runner is None:
                return  # closed: nothing is staged any more
            self._enter_thread(computes=False)
            self._runner.unstage(key)

    def set_processors(self, name: str, processors: Sequence[Callable[..., Any]] | None) -> None:
        """Registers logits processors under the name by which sequences ask for them; None forgets it.

        They are functions of this process, so only a rank in the driver's own process can be given any.
        """
        with self._stage_named("set_processors"):
            if processors is None:
                self._runner.processors.pop(name, None)
            else:
                self._runner.processors[name] = tuple(processors)

    def step(self, plan: bytes) -> bytes:
        """Launches an encoded `StepPlan`, returns encoded `FinishedSteps`.

        The answer has the results of the steps that have ended, and in any case of all but the newest: it waits for
        the one before the newest. An empty message launches nothing and waits for all.
        """
        with self._stage_named("step"):
            self._enter_thread()
            if plan:
                self._pending.append(self._launched(wire.decode(StepPlan, plan)))
            num_left = 1 if plan else 0
            results = []
            while self._pending and (len(self._pending) > num_left or self._pending[0].ready()):
                results.append(self._pending.popleft().result())
                self._last_step = results[-1].step_id
            if self._comm is not None:
                self._comm.check()
            return wire.encode(FinishedSteps(tuple(results)))

    def _launched(self, plan: StepPlan) -> PendingStep:
        try:
            pending: PendingStep = self._runner.launch(plan)
        except Exception:
            if self._comm is not None:
                self._comm.check()  # what a collective without a rank left behind may be the cause
            raise
        return pending

    def serve(self, path: str, token: str) -> None:
        """Runs the plans that come through the driver's socket at `path`, until the driver closes it."""
        from dist_vlm.workers.serve import serve

        serve(self.step, rank=self.rank, path=path, token=token)

    def take_images(self, path: str, token: str) -> None:
        """Stages and unstages what the driver asks for through its socket at `path`, until the driver closes it."""
        from dist_vlm.workers.take_images import take_images

        take_images(self.stage, self.unstage, rank=self.rank, path=path, token=token)

    def progress(self) -> int:
        """The last step whose result this rank has read from its device, -1 before the first."""
        return self._last_step

    def ping(self) -> int:
        """The process id."""
        return os.getpid()

    def watch(self) -> None:
        """Never returns: what waits for it learns of the end of this process."""
        threading.Event().wait()

    def close(self) -> None:
        """Leaves the group. Only a rank in the driver's own process needs it; others just end."""
        if self._comm is not None:
            self._comm.close()
        self._pending.clear()
        self._runner = self._comm = self._store = None

    def _enter_thread(self, *, computes: bool = True) -> None:
        """Gives the calling thread this rank's GPU or number of threads: both are a thread's own setting.

        A CPU thread that only takes images may be the driver's own, and keeps its number.
        """
        on_gpu = self._config.device == "cuda"
        if getattr(self._thread, "ready", False) or not (computes or on_gpu):
            return
        import torch

        if on_gpu:
            if not torch.cuda.is_available():
                raise RuntimeError("torch sees no GPU on this machine")
            torch.cuda.set_device(self._gpu)
        elif self._config.num_threads > 0:
            torch.set_num_threads(self._config.num_threads)
        self._thread.ready = True

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._prepare_seconds[part] = time.monotonic() - began

    @contextmanager
    def _stage_named(self, stage: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            _log.exception("rank %d failed: %s", self.rank, stage)
            raise RankError(self.rank, stage, describe(error)) from None


def _gpu_ordinal() -> int:
    """The ordinal, in this process, of the GPU that Ray gave this rank; the current one where Ray gave none."""
    import torch

    try:
        import ray

        given = ray.get_runtime_context().get_accelerator_ids().get("GPU", []) if ray.is_initialized() else []
    except ImportError:
        given = []
    if not given:
        return torch.cuda.current_device() if torch.cuda.is_available() else 0
    # Ray names GPUs as CUDA_VISIBLE_DEVICES does where it is set; torch counts from 0 in its order.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible else []
    return names.index(given[0]) if given[0] in names else int(given[0])
