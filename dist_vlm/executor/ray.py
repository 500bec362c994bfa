"""The ranks as Ray actors: placed, started, watched and ended here. Plans go through a `Transport`."""

from __future__ import annotations

import atexit
import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from dist_vlm.executor import ahead, placement
from dist_vlm.executor.base import Executor, ExecutorError, ExecutorInfo, StagedImage, StageKind, StartError
from dist_vlm.executor.deadline import Deadline
from dist_vlm.executor.heartbeat import Heartbeat
from dist_vlm.executor.in_flight import PlansInFlight
from dist_vlm.executor.ray_cluster import RayCluster
from dist_vlm.executor.ray_start import create_actors, start_ranks
from dist_vlm.executor.shared_staging import SharedStaging
from dist_vlm.executor.staging import ImageStaging
from dist_vlm.executor.transport import Transport, TransportClosedError, TransportTimeoutError
from dist_vlm.executor.transport_choice import TRANSPORTS
from dist_vlm.executor.watch import DeathWatch
from dist_vlm.workers import wire
from dist_vlm.workers.config import RankConfig
from dist_vlm.workers.failure import RankError, describe
from dist_vlm.workers.plan import StepPlan, StepResult
from dist_vlm.workers.worker import RUNNER

if TYPE_CHECKING:
    import numpy as np

# When one rank dies in a step, a peer's collective may fail first; this long the death may take to be known.
_DEATH_WAIT_S = 1.0
# What a start takes to notice that its ranks are killed.
_START_END_S = 10.0
# What a rank that is alive takes to say how far it is.
_STATUS_WAIT_S = 0.5
# What ends the ranks when it happens to a plan or an image on its way or to an answer.
_FAILURES = (RankError, TransportClosedError, TransportTimeoutError, wire.WireError, ExecutorError)

_log = logging.getLogger(__name__)


class RayExecutor(Executor):
    """config: what every rank is told, apart from its rank.

    ray_address: None (this process's Ray, else RAY_ADDRESS, else a private Ray on 127.0.0.1), "auto" or "host:port".
    start_timeout_s: for the whole start, from connecting to Ray to the first plan.
    step_timeout_s: how long `collect` waits for one plan.
    num_blocks: KV blocks to allocate; None takes what fits the tightest rank.
    max_steps_in_flight: plans that may be submitted and not collected.
    transport: "ray" (a compiled graph) or "direct" (unix sockets; the ranks must be on the driver's machine).
    """

    can_restart = True

    def __init__(
        self,
        config: RankConfig,
        *,
        ray_address: str | None = None,
        start_timeout_s: float = 300.0,
        step_timeout_s: float = 60.0,
        num_blocks: int | None = None,
        max_steps_in_flight: int = 4,
        runner: str = RUNNER,
        transport: str = "ray",
    ) -> None:
        self._config = config
        self._ray_address = ray_address
        self._start_timeout_s = start_timeout_s
        self._step_timeout_s = step_timeout_s
        self._num_blocks = num_blocks
        self._max_steps_in_flight = max_steps_in_flight
        self._runner = runner
        self._transport_class = TRANSPORTS[transport]
        self._cluster = RayCluster()
        self._ahead: ahead.AheadProcess | None = None
        self._reading: ahead.AheadProcess | None = None
        self._places: placement.Places | None = None
        self._actors: list[Any] = []
        self._transport: Transport | None = None
        self._plans: PlansInFlight | None = None
        self._watch: DeathWatch | None = None
        self._heartbeat: Heartbeat | None = None
        self._images: ImageStaging | SharedStaging = ImageStaging(self._actors)
        self._dead: ExecutorError | None = None
        self._is_closed = False
        self._starting = threading.RLock()

    def start(self) -> ExecutorInfo:
        if self._actors or self._dead is not None:
            raise ExecutorError("start", "the executor was started before")
        info = self._start_or_end(self._start)
        # Ray's own exit is registered by now, so ours comes before it.
        atexit.register(self.shutdown)
        return info

    def restart(self) -> ExecutorInfo:
        with self._starting:
            if self._dead is None or self._is_closed or self._places is None:
                raise ExecutorError("restart", "only ranks that were started and lost can be replaced")
            self._end_ranks()
            self._dead = None
            return self._start_or_end(self._start_ranks)

    def _start_or_end(self, start: Callable[[Deadline], ExecutorInfo]) -> ExecutorInfo:
        """Leaves nothing behind where it raises. A shutdown by another thread waits for it, and makes it raise."""
        try:
            with self._starting:
                return start(Deadline(self._start_timeout_s))
        except BaseException as error:
            self.shutdown()
            if isinstance(error, StartError) or not isinstance(error, Exception):
                raise
            raise StartError("start", describe(error)) from None

    def _start(self, deadline: Deadline) -> ExecutorInfo:
        config = self._config
        if ahead.reads(config, ray_address=self._ray_address):
            self._reading = ahead.AheadProcess(ahead.reading_command(), "reading ahead")
        if ahead.is_wanted(config, ray_address=self._ray_address):
            self._ahead = ahead.AheadProcess(ahead.command(config))
        import ray  # noqa: F401 - its share of the time is told by itself

        deadline.lap("ray import")
        self._cluster.connect(
            self._ray_address,
            # One more than the ranks take: Ray starts a process for each ahead, and the transport needs one too.
            num_cpus=config.world_size + 1,
            use_gpus=config.device == "cuda",
            timeout_s=deadline.remaining_s,
        )
        deadline.lap("ray")
        self._places = placement.of_this_actor(config) or placement.reserve(config, cpus=self._cpus)
        info = self._start_ranks(deadline)
        if self._reading is not None:
            self._reading.stop()
            self._reading = None
        return info

    @property
    def _cpus(self) -> float:
        """That Ray reserves for a rank."""
        return placement.PRIVATE_CPUS if self._cluster.on_private else 1.0

    def _start_ranks(self, deadline: Deadline) -> ExecutorInfo:
        """In the places that are reserved for them."""
        assert self._places is not None
        self._require_open()
        placement.ready(self._places.group, deadline.remaining_s)
        deadline.lap("placement")
        self._require_open()
        self._actors += create_actors(
            self._config,
            self._places,
            resources=placement.rank_bundle(self._config, cpus=self._cpus),
            runner=self._runner,
            private=self._cluster.on_private,
        )
        self._require_open()  # from here on a shutdown finds these ranks and ends them, which ends what waits for them
        info = start_ranks(
            self._actors,
            deadline=deadline,
            collective_timeout_s=self._step_timeout_s,
            num_blocks=self._num_blocks,
        )
        self._open_transport(deadline)
        self._heartbeat = Heartbeat(self._actors)
        deadline.lap("transport")
        self._require_open()
        return dataclasses.replace(info, start_seconds=deadline.laps)

    def _require_open(self) -> None:
        """Any call of a Ray that was shut down meanwhile would start another one."""
        if self._is_closed:
            raise StartError("start", "the executor was shut down meanwhile")

    def _open_transport(self, deadline: Deadline) -> None:
        self._watch = DeathWatch(self._actors, partial(self._on_death, tuple(self._actors)))
        # What opens the transport has no timeout of its own: at the deadline the ranks go, and it fails.
        alarm = threading.Timer(deadline.remaining_s, self._kill_ranks)
        alarm.start()
        try:
            self._transport = self._transport_class(
                self._actors, depth=self._max_steps_in_flight + 1, send_timeout_s=self._step_timeout_s
            )
            self._plans = PlansInFlight(self._transport, num_ranks=len(self._actors), limit=self._max_steps_in_flight)
            if self._places is not None and placement.is_here(self._places.group):
                if hasattr(os, "memfd_create"):
                    self._images = SharedStaging(self._actors)
                else:
                    _log.warning("images go through Ray, which takes longer: this Python has no os.memfd_create")
        except Exception as error:
            if deadline.over:
                raise StartError("transport", f"not done within start_timeout_s = {deadline.seconds:g}") from None
            death = self._watch.wait(_DEATH_WAIT_S)
            rank, cause = death if death is not None else (None, describe(error))
            raise StartError("transport", cause, rank) from None
        finally:
            alarm.cancel()

    def stage(self, key: str, kind: StageKind, array: np.ndarray) -> None:
        self._alive()
        try:
            self._images.stage(key, kind, array)
        except _FAILURES as error:
            raise self._fail(error) from None

    def poll_staged(self) -> Sequence[StagedImage]:
        self._alive()
        try:
            return self._images.poll()
        except _FAILURES as error:
            raise self._fail(error) from None

    def unstage(self, key: str) -> None:
        self._alive()
        try:
            self._images.unstage(key)
        except _FAILURES as error:
            raise self._fail(error) from None

    def wait_staged(self, timeout_s: float) -> None:
        self._images.wait(timeout_s)

    def submit(self, plan: StepPlan) -> None:
        plans = self._alive()
        try:
            plans.submit(plan)
        except _FAILURES as error:
            raise self._fail(error) from None

    def collect(self) -> StepResult:
        plans = self._alive()
        if plans.oldest is None:
            raise ExecutorError("step", "collect() with no plan submitted")
        try:
            self._images.advance()
            self.last_results = plans.collect(self._step_timeout_s)
        except _FAILURES as error:
            raise self._fail(error) from None
        if self._heartbeat is not None:
            self._heartbeat.heard()
        return self.last_results[0]

    def heard_at(self) -> tuple[float, ...]:
        heartbeat = self._heartbeat
        return () if heartbeat is None else heartbeat.heard_at()

    def check(self) -> None:
        self._alive()
        try:
            self._images.advance()
        except _FAILURES as error:
            raise self._fail(error) from None

    def shutdown(self) -> None:
        atexit.unregister(self.shutdown)
        self._is_closed = True
        if self._dead is None:
            self._dead = ExecutorError("step", "the executor is shut down")
        for process in (self._reading, self._ahead):
            if process is not None:
                process.stop()
        self._reading = self._ahead = None
        self._stop_watching()
        self._kill_ranks()
        # Ray is used by a start in another thread until that has noticed.
        is_alone = self._starting.acquire(timeout=_START_END_S)
        try:
            self._leave_ray()
        finally:
            if is_alone:
                self._starting.release()

    def _leave_ray(self) -> None:
        self._end_ranks()
        if self._places is not None and self._places.is_ours:
            _remove(self._places.group)
        self._places = None
        self._cluster.close()

    def _end_ranks(self) -> None:
        self._stop_watching()
        # Killed first: closing the transport would wait for a rank that is stuck in a step.
        self._kill_ranks()
        if self._heartbeat is not None:
            self._heartbeat.join()
        if self._watch is not None:
            self._watch.join()
            self._watch = None
        if self._transport is not None:
            self._transport.close()
            self._transport = self._plans = None
        self._images.close()
        self._actors.clear()
        self._images = ImageStaging(self._actors)

    def _alive(self) -> PlansInFlight:
        if self._dead is not None:
            raise self._dead
        if self._watch is not None and self._watch.first is not None:
            raise self._fail(TransportClosedError("a rank died"))
        if self._plans is None:
            raise ExecutorError("step", "the executor is not started")
        return self._plans

    def _fail(self, error: Exception) -> ExecutorError:
        """Names who is to blame for a failed step, and ends every rank: they no longer hold the same state."""
        self._dead = self._explain(error)
        _log.error("%s", self._dead)
        self._stop_watching()
        self._kill_ranks()
        if self._transport is not None:
            self._transport.close()
        return self._dead

    def _explain(self, error: Exception) -> ExecutorError:
        if isinstance(error, ExecutorError):
            return error
        if isinstance(error, TransportTimeoutError):
            return self._explain_timeout()
        death = self._watch.wait(_DEATH_WAIT_S) if self._watch is not None else None
        if death is not None:
            return ExecutorError("step", death[1], death[0])
        if isinstance(error, RankError):
            return ExecutorError(error.stage, error.cause, error.rank)
        return ExecutorError("step", describe(error))

    def _explain_timeout(self) -> ExecutorError:
        import ray

        oldest = self._plans.oldest if self._plans is not None else None
        step_id = -1 if oldest is None else oldest
        refs = [actor.progress.options(concurrency_group="status").remote() for actor in self._actors]
        ended, _ = ray.wait(refs, num_returns=len(refs), timeout=_STATUS_WAIT_S)
        behind = [rank for rank, ref in enumerate(refs) if ref not in ended or _finished_before(ref, step_id)] or list(
            range(len(refs))
        )
        names = ("rank " if len(behind) == 1 else "ranks ") + ", ".join(map(str, behind))
        cause = f"{names} did not finish step {step_id} in step_timeout_s = {self._step_timeout_s:g}"
        return ExecutorError("step", cause, behind[0])

    def _on_death(self, actors: Sequence[Any], rank: int, cause: str) -> None:
        """In the watch's thread: ends the others, so that whoever waits for the transport is told.

        actors: those that are watched. Where this thread comes late there may be others by now, and their transport.
        """
        transport = self._transport
        _log.error("rank %d: %s", rank, cause)
        _kill(actors)
        if transport is not None and tuple(self._actors) == actors:
            transport.close()

    def _stop_watching(self) -> None:
        """What becomes of the ranks from here on is our own doing."""
        for observer in (self._watch, self._heartbeat):
            if observer is not None:
                observer.stop()

    def _kill_ranks(self) -> None:
        _kill(tuple(self._actors))


def _kill(actors: Sequence[Any]) -> None:
    import ray

    for actor in actors if ray.is_initialized() else ():
        with suppress(Exception):
            ray.kill(actor, no_restart=True)


def _remove(group: Any) -> None:
    import ray

    # Where the user has shut Ray down already, any call would start another one.
    if ray.is_initialized():
        with suppress(Exception):
            ray.util.remove_placement_group(group)


def _finished_before(ref: Any, step_id: int) -> bool:
    import ray

    try:
        finished: int = ray.get(ref, timeout=0)
    except Exception:
        return True
    return finished < step_id
