"""The Ray executor over a runner without a model: order, agreement, deaths, deadlines, images."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import ray
from processes import stop
from stand_in import RUNNER, rank_config

from dist_vlm.executor import heartbeat, placement
from dist_vlm.executor.base import ExecutorError, StagedImage, StartError
from dist_vlm.executor.placement import PRIVATE_CPUS
from dist_vlm.executor.ray import RayExecutor
from dist_vlm.executor.transport_choice import TRANSPORTS
from dist_vlm.workers.plan import NewSequence, SampledTokens, SamplingRow, Slice, StepPlan

pytestmark = pytest.mark.usefixtures("shared_ray")

Make = Callable[..., RayExecutor]
NOTICE_S = 2.0

over_both = pytest.mark.parametrize("transport", sorted(TRANSPORTS))


def decode(step_id: int, position: int = 5, **fields: object) -> StepPlan:
    return StepPlan(step_id, slices=(Slice(1, position, 1, (), True),), **fields)  # type: ignore[arg-type]


def until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    """Waits for a condition that must come true within `within_s`."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.02)


class Pair:
    """A running executor of two ranks whose next step id is counted here."""

    def __init__(self, executor: RayExecutor) -> None:
        self.executor = executor
        self.next_step = 0

    def step(self, **fields: object) -> tuple[SampledTokens, ...]:
        self.executor.submit(decode(self.next_step, **fields))
        self.next_step += 1
        return self.executor.collect().sampled


@pytest.fixture(scope="module", params=sorted(TRANSPORTS))
def pair(shared_ray: object, request: pytest.FixtureRequest) -> Iterator[Pair]:
    config = rank_config(2, {"collective": True})
    executor = RayExecutor(config, runner=RUNNER, transport=request.param, step_timeout_s=20)
    info = executor.start()
    assert info.num_blocks == 100
    assert [report.num_blocks for report in info.reports] == [100, 110]
    stages = ["ray import", "ray", "placement", "actor", "join", "load", "allocate", "transport"]
    parts = ["actor: runner", "actor: model", "actor: device"]
    assert sorted(info.start_seconds) == sorted(stages + parts)
    assert 0 < sum(info.start_seconds[part] for part in parts) <= info.start_seconds["actor"]
    yield Pair(executor)
    executor.shutdown()


def test_a_step_runs_on_every_rank_of_one_group(pair: Pair) -> None:
    # 1000 * slot + position + the sum over ranks 1 and 2.
    assert pair.step() == (SampledTokens(1, (1000 + 6 + 3,)),)
    results = pair.executor.last_results
    assert [result.rank for result in results] == [0, 1]
    assert results[0].counters.busy_us != results[1].counters.busy_us, "the stand-in reports its process id"


def test_several_plans_in_flight_are_answered_in_order(pair: Pair) -> None:
    first = pair.next_step
    for step_id in range(first, first + 4):
        pair.executor.submit(decode(step_id, position=step_id))
    pair.next_step += 4
    answers = [pair.executor.collect() for _ in range(4)]
    assert [answer.step_id for answer in answers] == list(range(first, first + 4))
    assert [answer.sampled[0].token_ids[0] for answer in answers] == [1000 + i + 1 + 3 for i in range(first, first + 4)]


def test_a_long_prompt_passes_and_a_short_plan_after_it(pair: Pair) -> None:
    tokens = tuple(range(100_000, 1_100_000))
    new = (NewSequence(1, tokens, len(tokens), (), SamplingRow()),)
    assert pair.step(new=new) == (SampledTokens(1, (1009,)),)
    assert pair.step() == (SampledTokens(1, (1009,)),)


def test_a_step_counts_as_hearing_every_rank(pair: Pair) -> None:
    executor, moment = pair.executor, time.monotonic()
    assert executor._heartbeat is not None
    executor._heartbeat._heard_at[:] = [moment - 100.0] * 2
    pair.step()
    assert moment < min(executor.heard_at()) <= max(executor.heard_at()) <= time.monotonic()


def staged(executor: RayExecutor, count: int) -> list[StagedImage]:
    images: list[StagedImage] = []
    end = time.monotonic() + 10
    while len(images) < count and time.monotonic() < end:
        images += executor.poll_staged()
    return images


def test_an_image_reaches_every_rank_and_leaves_again(pair: Pair) -> None:
    pixels = np.ones((1, 3, 2, 2), np.float32)
    pair.executor.stage("cat", "pixel_values", pixels)
    pair.executor.stage("dog", "image_features", np.full((1, 2, 4), 2.0, np.float32))
    assert sorted(staged(pair.executor, 2), key=lambda image: image.key) == [
        StagedImage("cat", None),
        StagedImage("dog", None),
    ]
    # The stand-in adds the image's sum, 12, on both ranks.
    assert pair.step(encode=("cat",)) == (SampledTokens(1, (1009 + 12,)),)
    assert pair.step(encode=("cat", "dog")) == (SampledTokens(1, (1009 + 28,)),)
    pair.executor.unstage("cat")
    pair.executor.stage("cat", "pixel_values", 2 * pixels)
    assert staged(pair.executor, 1) == [StagedImage("cat", None)]
    assert pair.step(encode=("cat",)) == (SampledTokens(1, (1009 + 24,)),)


def test_an_image_forgotten_on_its_way_is_not_reported(pair: Pair) -> None:
    pair.executor.stage("late", "pixel_values", np.ones((1, 3, 2, 2), np.float32))
    pair.executor.unstage("late")
    time.sleep(0.2)
    assert pair.executor.poll_staged() == []


def test_an_image_for_which_there_is_no_memory_is_reported_and_leaves(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOMEM, "no memory")

    pixels = np.ones((1, 3, 2, 2), np.float32)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        pair.executor.stage("big", "pixel_values", pixels)
        pair.executor.wait_staged(20)
        (image,) = pair.executor.poll_staged()
        assert image.key == "big" and "no memory" in str(image.error)
    pair.executor.unstage("big")
    pair.executor.stage("big", "pixel_values", pixels)
    assert staged(pair.executor, 1) == [StagedImage("big", None)]
    pair.executor.unstage("big")


@pytest.mark.parametrize("is_here", [False, True])
def test_to_ranks_on_another_machine_and_where_python_makes_no_nameless_memory_images_go_through_ray(
    make_ray_executor: Make, monkeypatch: pytest.MonkeyPatch, is_here: bool
) -> None:
    monkeypatch.setattr(placement, "is_here", lambda group: is_here)
    monkeypatch.delattr(os, "memfd_create")
    executor = make_ray_executor(2)
    executor.start()
    executor.stage("cat", "pixel_values", np.ones((1, 3, 2, 2), np.float32))
    images: list[StagedImage] = []
    for _ in range(5):
        executor.wait_staged(10)
        images += executor.poll_staged()
        if images:
            break
    assert images == [StagedImage("cat", None)]
    executor.submit(decode(0, encode=("cat",)))
    assert executor.collect().sampled == (SampledTokens(1, (1006 + 12,)),)


@over_both
def test_a_rank_killed_while_an_image_is_on_its_way_is_named_and_the_image_not_blamed(
    make_ray_executor: Make, transport: str
) -> None:
    """It can be given to the ranks that come in their place: nobody was told that it failed."""
    executor = make_ray_executor(2, transport=transport)
    executor.start()
    pids = ray.get([actor.ping.options(concurrency_group="status").remote() for actor in executor._actors])
    stop(pids[1])
    for number in range(40):
        executor.stage(str(number), "pixel_values", np.ones((1, 3, 2, 2), np.float32))
    images = list(executor.poll_staged())
    os.kill(pids[1], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(ExecutorError, match=r"\(rank 1\): its process died"):
        while time.monotonic() - began < NOTICE_S:
            executor.wait_staged(0.01)
            images += executor.poll_staged()
    assert images == []
    executor.restart()
    executor.stage("3", "pixel_values", np.ones((1, 3, 2, 2), np.float32))
    assert staged(executor, 1) == [StagedImage("3", None)]


def test_shutdown_ends_the_rank_and_leaves_the_ray_that_was_there(make_ray_executor: Make, pair: Pair) -> None:
    executor = make_ray_executor(1)
    executor.start()
    executor.submit(decode(0))
    result = executor.collect()
    assert result.sampled == (SampledTokens(1, (1006,)),)
    executor.shutdown()
    executor.shutdown()
    until(lambda: not os.path.exists(f"/proc/{result.counters.busy_us}"))
    assert ray.is_initialized()
    # The module's pair holds its two eighths of a core.
    until(lambda: ray.available_resources().get("CPU") == 4.0 - 2 * PRIVATE_CPUS)
    with pytest.raises(ExecutorError, match="shut down"):
        executor.submit(decode(1))
    with pytest.raises(ExecutorError, match="only ranks that were started and lost"):
        executor.restart()


def test_an_image_that_one_rank_cannot_take_is_reported_with_its_cause(make_ray_executor: Make) -> None:
    executor = make_ray_executor(2, {"fault": {"rank": 1, "at": "stage", "do": "raise"}})
    executor.start()
    executor.stage("cat", "pixel_values", np.ones((1, 3, 2, 2), np.float32))
    (image,) = staged(executor, 1)
    assert image == StagedImage("cat", "rank 1: FileNotFoundError: no model.safetensors in /nowhere")
    # A rank that died while nobody stepped is noticed by whatever is called next.
    os.kill(ray.get(executor._actors[1].ping.remote()), signal.SIGKILL)
    with pytest.raises(ExecutorError, match="rank 1.*died") as caught:
        until(lambda: executor.poll_staged() is None)
    assert caught.value.rank == 1


def test_each_rank_is_heard_while_it_lives_and_a_death_is_found_though_nobody_steps(
    make_ray_executor: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_PERIOD_S", 0.2)
    others = threading.enumerate()
    executor = make_ray_executor(2, {"work_s": 1.2})
    assert executor.heard_at() == ()
    executor.start()
    executor.submit(decode(0))
    moment = time.monotonic()
    # Amid the step: its end, which counts too, has not been collected.
    until(lambda: min(executor.heard_at()) > moment, within_s=1.1)
    executor.collect()
    assert time.monotonic() > moment + 1.1
    first, second = (result.counters.busy_us for result in executor.last_results)

    os.kill(second, signal.SIGSTOP)
    moment = time.monotonic()
    until(lambda: executor.heard_at()[0] > moment + 0.6)
    assert executor.heard_at()[1] < moment + 0.4, "an answer from before may have been on its way"
    executor.check()
    os.kill(second, signal.SIGCONT)
    moment = time.monotonic()
    until(lambda: min(executor.heard_at()) > moment)

    os.kill(first, signal.SIGSTOP)
    os.kill(second, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(ExecutorError, match=r"step failed \(rank 1\): its process died"):
        while time.monotonic() - began < NOTICE_S:
            executor.check()
            time.sleep(0.02)
    executor.shutdown()
    until(lambda: not os.path.exists(f"/proc/{first}"))
    left = [one.name for one in threading.enumerate() if one not in others]
    assert not {"rank-heartbeat", "rank-death-watch"} & set(left)
    assert len(executor.heard_at()) == 2


@pytest.mark.parametrize(("transport", "rank"), [("direct", 1), ("ray", 0), ("ray", 1)])
def test_a_rank_killed_with_two_steps_in_flight_ends_collect_by_name(
    make_ray_executor: Make, rank: int, transport: str
) -> None:
    # Without a collective only the watch can tell: the other rank answers, or is not asked.
    model = {"collective": rank == 1, "fault": {"rank": rank, "at": 1, "do": "hang"}}
    executor = make_ray_executor(2, model, transport=transport)
    executor.start()
    executor.submit(decode(0))
    executor.collect()
    killed_pid = executor.last_results[rank].counters.busy_us
    executor.submit(decode(1))
    executor.submit(decode(2))
    killed_at: list[float] = []

    def kill() -> None:
        time.sleep(0.3)
        killed_at.append(time.monotonic())
        os.kill(killed_pid, signal.SIGKILL)

    threading.Thread(target=kill).start()
    with pytest.raises(ExecutorError) as caught:
        executor.collect()
    assert time.monotonic() - killed_at[0] < NOTICE_S
    assert caught.value.rank == rank
    assert caught.value.stage == "step"
    assert "died" in caught.value.cause
    assert "\n" not in str(caught.value)
    with pytest.raises(ExecutorError, match="died"):
        executor.submit(decode(3))

    lost = {result.counters.busy_us for result in executor.last_results}
    assert executor.restart().num_blocks == 100
    executor.stage("cat", "pixel_values", np.ones((1, 3, 2, 2), np.float32))
    assert staged(executor, 1) == [StagedImage("cat", None)]
    executor.submit(decode(0, encode=("cat",)))
    executor.collect()
    assert [result.step_id for result in executor.last_results] == [0, 0]
    assert not lost & {result.counters.busy_us for result in executor.last_results}
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in lost))
    executor.check()


@over_both
def test_a_step_that_takes_too_long_names_the_rank(make_ray_executor: Make, transport: str) -> None:
    executor = make_ray_executor(
        2, {"fault": {"rank": 1, "at": 0, "do": "hang"}}, step_timeout_s=1.0, transport=transport
    )
    executor.start()
    executor.submit(decode(0))
    began = time.monotonic()
    with pytest.raises(ExecutorError, match=r"rank 1 did not finish step 0 in step_timeout_s = 1$") as caught:
        executor.collect()
    assert 0.9 < time.monotonic() - began < 1.0 + NOTICE_S
    assert caught.value.rank == 1


@over_both
def test_ranks_that_disagree_are_named(make_ray_executor: Make, transport: str) -> None:
    executor = make_ray_executor(2, {"fault": {"rank": 1, "at": 1, "do": "differ"}}, transport=transport)
    executor.start()
    for step_id in (0, 1):
        executor.submit(decode(step_id))
    assert executor.collect().step_id == 0
    with pytest.raises(ExecutorError, match="ranks disagree in step 1: ranks 0, 1 .* differ in sampled"):
        executor.collect()


@over_both
def test_a_step_that_raises_is_named_though_its_peer_hangs_in_a_collective(
    make_ray_executor: Make, transport: str
) -> None:
    model = {"collective": True, "fault": {"rank": 1, "at": 0, "do": "raise"}}
    executor = make_ray_executor(2, model, transport=transport)
    executor.start()
    executor.submit(decode(0))
    began = time.monotonic()
    with pytest.raises(ExecutorError) as caught:
        executor.collect()
    assert time.monotonic() - began < 2 * NOTICE_S
    assert (caught.value.rank, caught.value.stage) == (1, "step")
    assert caught.value.cause == "FileNotFoundError: no model.safetensors in /nowhere"


def test_a_rank_that_dies_while_it_loads_is_named(make_ray_executor: Make) -> None:
    executor = make_ray_executor(2, {"fault": {"rank": 1, "at": "load", "do": "exit"}})
    with pytest.raises(StartError) as caught:
        executor.start()
    assert (caught.value.stage, caught.value.rank) == ("load", 1)
    assert "died" in caught.value.cause
    assert "\n" not in str(caught.value)


def test_a_start_that_hangs_ends_at_its_deadline(make_ray_executor: Make) -> None:
    executor = make_ray_executor(1, {"fault": {"at": "load", "do": "hang"}}, start_timeout_s=5.0)
    began = time.monotonic()
    with pytest.raises(StartError, match="start_timeout_s = 5") as caught:
        executor.start()
    assert 4.9 < time.monotonic() - began < 5.0 + NOTICE_S
    assert caught.value.rank == 0


def test_gpus_that_are_not_there_are_refused_at_once(shared_ray: object) -> None:
    executor = RayExecutor(rank_config(2, device="cuda"), runner=RUNNER)
    began = time.monotonic()
    with pytest.raises(StartError, match=r"2 ranks need 0.25 CPU, 2 GPU on one machine; .*: 4 CPU, 0 GPU") as caught:
        executor.start()
    assert caught.value.stage == "placement"
    assert time.monotonic() - began < NOTICE_S


def test_a_place_that_stays_taken_is_told(make_ray_executor: Make, pair: Pair) -> None:
    # The module's pair holds 2 of the 32 places that 4 CPUs have in a private Ray.
    executor = make_ray_executor(31, start_timeout_s=1.0)
    with pytest.raises(
        StartError,
        match="3.875 CPU, 0 GPU on one machine did not become free in time; free in the cluster: 3[.0-9]* CPU",
    ):
        executor.start()
