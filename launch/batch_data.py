"""A file of requests over several replicas: from the input's lines to their answers.

Ray Data's tasks prepare the pictures of a few lines each and pass the lines on one by one, each as a block of its own.
An actor for each replica answers them; the blocks go to it without passing through this process, which writes.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar

from dist_vlm.executor.base import ExecutorError, StartError
from dist_vlm.executor.deadline import Deadline
from dist_vlm.executor.errors import death_cause
from dist_vlm.executor.placement import STRATEGY, check_fits, engine_bundles_of, free, ready
from dist_vlm.executor.ray_cluster import RayCluster
from dist_vlm.launch.bounded_tasks import BoundedTasks
from dist_vlm.launch.engine_actor import EngineActor
from dist_vlm.launch.engine_pool import EnginePool, LinesGivenUp, ReplicaLost
from dist_vlm.launch.line_source import LineSource
from dist_vlm.launch.line_table import AnsweredLine, answered_lines, named_lines
from dist_vlm.launch.picture_task import prepare_part
from dist_vlm.machine import usable_cores
from dist_vlm.workers.failure import describe

if TYPE_CHECKING:
    from dist_vlm.config import EngineConfig
    from dist_vlm.launch.jsonl_request import RequestReader
    from dist_vlm.launch.line_source import LineParts
    from dist_vlm.launch.picture_setup import PictureSetup

# Lines in an actor beside those that run: they follow without a pause.
_LINES_AHEAD = 16
_JOIN_S = 5.0
# What an actor may take beside the start of its engine: its process and its imports.
_IMPORTS_S = 60.0


def answer_by_replicas(
    config: EngineConfig,
    *,
    path: str,
    parts: LineParts,
    reader: RequestReader,
    setup: PictureSetup,
    on_start: Callable[[], None],
    write: Callable[[AnsweredLine], None],
) -> None:
    """Answers the lines of `parts` of the file `path`; `write` gets each as it ends.

    config: resolved, with its replicas. on_start: called when one of them has started.
    Raises `ExecutorError` if there is no room for the replicas, or they do not start, or are lost again and again.
    """
    with ExitStack() as ending:
        deadline = Deadline(config.parallel.start_timeout_s)
        _connect(config, deadline, ending)
        starter = _Starter(config, reader, _placed(config, deadline, ending))
        source = _source(path, parts)
        ending.callback(_kill, source)
        with _data_context():
            lines = _prepared(parts, source=source, reader=reader, setup=setup)
            asyncio.run(_answer(starter, lines, config=config, on_start=on_start, write=write))


async def _answer(
    starter: _Starter,
    lines: Any,
    *,
    config: EngineConfig,
    on_start: Callable[[], None],
    write: Callable[[AnsweredLine], None],
) -> None:
    async def work_off(block: Any) -> None:
        try:
            table = await pool.ask(block)
        except LinesGivenUp as error:
            for line in named_lines(await block):
                write(AnsweredLine(line, {"error": str(error)}))
            return
        for answered in answered_lines(table):
            write(answered)

    replicas = config.parallel.replicas
    most = config.scheduler.max_num_seqs + _LINES_AHEAD

    async def start(number: int) -> _ActorReplica:
        replica = await starter.start(number)
        on_start()
        return replica

    # Pictures are prepared while the engines start.
    async with EnginePool(start, size=replicas, most=most) as pool, BoundedTasks(replicas * most) as tasks:
        await _each_block(lines, lambda block: tasks.start(work_off(block)))


async def _each_block(dataset: Any, take: Callable[[Any], Any]) -> None:
    """Calls `take` with a reference to each block, once the call before is done: nothing is prepared far ahead."""
    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()
    _Stop.asked.clear()

    def tell(error: BaseException | None) -> None:
        if over.done():
            return
        if error is None:
            over.set_result(None)
        else:
            over.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            for bundle in dataset.iter_internal_ref_bundles():
                for entry in bundle.blocks:
                    if _Stop.asked.is_set():
                        return
                    asyncio.run_coroutine_threadsafe(take(entry.ref), loop).result()
        except BaseException as caught:
            error = caught
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, error)

    thread = threading.Thread(target=run, name="blocks", daemon=True)
    thread.start()
    try:
        await over
    except (ExecutorError, asyncio.CancelledError):
        raise
    except Exception as error:
        raise ExecutorError("pictures", describe(error)) from None
    finally:
        _Stop.asked.set()
        await asyncio.to_thread(thread.join, _JOIN_S)


class _Stop:
    """An execution callback of Ray Data: breaks the pipeline of this process off when it is asked to. A class, since
    Ray Data makes the instance, and pickles what it is given."""

    asked: ClassVar[threading.Event] = threading.Event()

    def before_execution_starts(self, executor: Any) -> None: ...

    def on_execution_step(self, executor: Any) -> None:
        if self.asked.is_set():
            raise InterruptedError("the run ends")

    def after_execution_succeeds(self, executor: Any) -> None: ...

    def after_execution_fails(self, executor: Any, error: Exception) -> None: ...


# ---- the cluster ----


def _connect(config: EngineConfig, deadline: Deadline, ending: ExitStack) -> None:
    cluster = RayCluster()
    parallel = config.parallel
    cluster.connect(
        parallel.ray_address,
        # Those of a private Ray: a core for each rank and each engine, and the machine's for pictures.
        num_cpus=parallel.replicas * len(engine_bundles_of(parallel)) + max(1, usable_cores()),
        use_gpus=parallel.device == "cuda",
        timeout_s=deadline.remaining_s,
    )
    ending.callback(cluster.close)


def _placed(config: EngineConfig, deadline: Deadline, ending: ExitStack) -> list[Any]:
    """A placement group for each replica. Raises `StartError` where there is no room."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    replicas, bundles = config.parallel.replicas, engine_bundles_of(config.parallel)
    check_fits(bundles, what="a replica needs")
    there = ray.cluster_resources().get("CPU", 0.0)
    wanted = replicas * sum(one["CPU"] for one in bundles) + 1
    if there < wanted:
        text = f"{replicas} replicas and a task that prepares pictures need {wanted:g} CPU; Ray has {there:g} in all"
        raise StartError("placement", text)
    groups = []
    for _ in range(replicas):
        groups.append(placement_group(bundles, strategy=STRATEGY))
        ending.callback(_quietly, remove_placement_group, groups[-1])
    for group in groups:
        ready(group, deadline.remaining_s)
    return groups


class _ActorReplica:
    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def ask(self, lines: Any) -> Any:
        from ray.exceptions import RayActorError

        try:
            table = await self._actor.answer.remote(lines)
        except RayActorError as error:
            raise ReplicaLost(death_cause(error)) from None
        for answered in answered_lines(table):
            if answered.lost is not None:
                raise ReplicaLost(answered.lost)
        return table

    async def end(self) -> None:
        _kill(self._actor)


def one_engine(config: EngineConfig) -> EngineConfig:
    """What the actor of a replica is given: one engine, which runs in the actor's own process, where its core is."""
    return config.replace(replicas=1, max_replicas=None, engine_process=False, num_nodes=1, ray_address=None)


class _Starter:
    """Starts the engine of a placement group."""

    def __init__(self, config: EngineConfig, reader: RequestReader, groups: list[Any]) -> None:
        self._config = one_engine(config)
        self._reader = reader
        self._groups = groups

    async def start(self, number: int) -> _ActorReplica:
        """Raises `StartError` where there is no engine in time."""
        import ray
        from ray.exceptions import RayActorError
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        make_remote: Any = ray.remote
        actor = (
            make_remote(EngineActor)
            .options(
                num_cpus=1,
                max_restarts=0,
                max_concurrency=self._config.scheduler.max_num_seqs + _LINES_AHEAD + 1,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._groups[number], placement_group_bundle_index=0
                ),
            )
            .remote(self._config, self._reader)
        )
        limit_s = self._config.parallel.start_timeout_s + _IMPORTS_S
        try:
            async with asyncio.timeout(limit_s):
                problem = await actor.problem.remote()
        except TimeoutError:
            problem = f"its actor did not start in {limit_s:g} s; free in the cluster: {free()}"
        except RayActorError as error:
            problem = death_cause(error)
        except BaseException:
            _kill(actor)
            raise
        if problem is not None:
            _kill(actor)
            raise StartError("replica", problem)
        return _ActorReplica(actor)


# ---- the pictures ----


def _source(path: str, parts: LineParts) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    make_remote: Any = ray.remote
    return make_remote(LineSource).options(num_cpus=0, scheduling_strategy=here).remote(path, parts)


def _prepared(parts: LineParts, *, source: Any, reader: RequestReader, setup: PictureSetup) -> Any:
    import ray.data

    task: Any = prepare_part
    return ray.data.range(len(parts), override_num_blocks=len(parts)).map_batches(
        task,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"source": source, "reader": reader, "setup": setup},
        num_cpus=1,
    )


@contextmanager
def _data_context() -> Iterator[None]:
    """Ray Data's settings for this pipeline: silent, and a block for each line."""
    data: Any = importlib.import_module("ray.data")
    context = data.DataContext.get_current().copy()
    context.target_max_block_size = 1
    context.target_min_block_size = 1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, _Stop]
    os.environ.setdefault("RAY_DATA_USAGE_DISABLED", "1")  # it would look for a Prometheus at the end, and report
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with data.DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)


def _kill(actor: Any) -> None:
    import ray

    _quietly(ray.kill, actor)


def _quietly(function: Any, *arguments: Any) -> None:
    with suppress(Exception):
        function(*arguments)
