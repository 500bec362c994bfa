"""What every transport must do, whatever carries it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from stand_in import RUNNER, rank_config

from dist_vlm.executor import placement
from dist_vlm.executor.deadline import Deadline
from dist_vlm.executor.ray_start import create_actors, start_ranks
from dist_vlm.executor.transport import Transport, TransportClosedError, TransportTimeoutError
from dist_vlm.executor.transport_choice import TRANSPORTS
from dist_vlm.workers import wire
from dist_vlm.workers.failure import RankError
from dist_vlm.workers.pending import FinishedSteps
from dist_vlm.workers.plan import NewSequence, SamplingRow, StepPlan, StepResult

pytestmark = pytest.mark.usefixtures("shared_ray")

DEPTH = 3


class Ends:
    """Two started ranks and a transport to them."""

    def __init__(self, name: str, model: dict[str, Any]) -> None:
        config = rank_config(2, model)
        self.places = placement.reserve(config)
        resources = placement.rank_bundle(config)
        placement.ready(self.places.group, 20.0)
        self.actors = create_actors(config, self.places, resources=resources, runner=RUNNER, private=True)
        start_ranks(self.actors, deadline=Deadline(60), collective_timeout_s=60, num_blocks=None)
        self.pids: list[int] = ray.get([actor.ping.remote() for actor in self.actors])
        self.transport: Transport = TRANSPORTS[name](self.actors, depth=DEPTH, send_timeout_s=10)
        self.next_step = 0

    def send(self, **fields: Any) -> int:
        self.transport.send(wire.encode(StepPlan(self.next_step, **fields)))
        self.next_step += 1
        return self.next_step - 1

    def receive(self, timeout_s: float = 20.0) -> list[StepResult]:
        """Each rank's one result: the stand-in's steps end with their launch."""
        answers = [wire.decode(FinishedSteps, answer).results for answer in self.transport.receive(timeout_s)]
        assert [len(results) for results in answers] == [1, 1]
        return [results[0] for results in answers]

    def end(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        self.transport.close()
        ray.util.remove_placement_group(self.places.group)


@pytest.fixture
def start(shared_ray: object) -> Iterator[Callable[..., Ends]]:
    started: list[Ends] = []

    def begin(name: str, **model: Any) -> Ends:
        started.append(Ends(name, model))
        return started[-1]

    yield begin
    for ends in started:
        ends.end()


@pytest.fixture(scope="module", params=sorted(TRANSPORTS))
def ends(shared_ray: object, request: pytest.FixtureRequest) -> Iterator[Ends]:
    ends = Ends(request.param, {})
    yield ends
    ends.end()


def test_answers_come_in_order_and_by_rank(ends: Ends) -> None:
    sent = [ends.send() for _ in range(DEPTH)]
    for step_id in sent:
        assert [(answer.step_id, answer.rank) for answer in ends.receive()] == [(step_id, 0), (step_id, 1)]


@pytest.mark.parametrize("num_tokens", [10, 100_000, 1_000_000])
def test_a_message_of_any_size_passes(ends: Ends, num_tokens: int) -> None:
    tokens = (100_000,) * num_tokens
    for _ in range(DEPTH):
        ends.send(new=(NewSequence(0, tokens, num_tokens, (), SamplingRow()),))
    ends.receive()
    ends.send()
    for _ in range(DEPTH):
        assert len(ends.receive()) == 2


def test_an_empty_message_passes_and_brings_nothing_that_was_answered(ends: Ends) -> None:
    ends.send()
    ends.receive()
    ends.transport.send(b"")
    assert [wire.decode(FinishedSteps, answer) for answer in ends.transport.receive(20.0)] == [FinishedSteps(())] * 2


def test_more_than_depth_unanswered_messages_are_refused(ends: Ends) -> None:
    for _ in range(DEPTH):
        ends.send()
    with pytest.raises(RuntimeError, match=f"{DEPTH} messages are unanswered"):
        ends.transport.send(b"")
    for _ in range(DEPTH):
        ends.receive()
    with pytest.raises(RuntimeError, match="no message unanswered"):
        ends.receive()


def test_bytes_that_are_no_plan_are_refused_by_the_rank(ends: Ends) -> None:
    ends.transport.send(b"\x93not a plan")
    with pytest.raises(RankError, match="step: WireError") as caught:
        ends.receive()
    assert caught.value.rank in (0, 1)


@pytest.mark.parametrize("name", sorted(TRANSPORTS))
def test_a_late_answer_is_a_timeout_and_close_frees_the_sender(start: Callable[..., Ends], name: str) -> None:
    ends = start(name, fault={"rank": 1, "at": 0, "do": "hang"})
    ends.send()
    began = time.monotonic()
    with pytest.raises(TransportTimeoutError):
        ends.receive(timeout_s=0.5)
    assert 0.4 < time.monotonic() - began < 2.0
    for pid in ends.pids:
        os.kill(pid, signal.SIGKILL)
    ends.transport.close()
    ends.transport.close()
    with pytest.raises(TransportClosedError):
        ends.send()


@pytest.mark.parametrize("name", sorted(TRANSPORTS))
def test_long_plans_and_long_answers_do_not_wait_for_each_other(start: Callable[..., Ends], name: str) -> None:
    # 1.5 MB a plan and as much an answer, both far above what a socket holds.
    ends = start(name, answer_tokens=300_000)
    new = (NewSequence(0, (100_000,) * 300_000, 300_000, (), SamplingRow()),)
    sent = [ends.send(new=new) for _ in range(DEPTH)]
    for step_id in sent:
        answers = ends.receive()
        assert [answer.step_id for answer in answers] == [step_id] * 2
        assert [answer.sampled[-1].token_ids for answer in answers] == [(100_000,) * 300_000] * 2


@pytest.mark.parametrize("name", sorted(TRANSPORTS))
def test_close_in_another_thread_ends_a_receive(start: Callable[..., Ends], name: str) -> None:
    ends = start(name, fault={"rank": 0, "at": 1, "do": "hang"})
    ends.send()
    ends.receive()
    ends.send()
    threading.Timer(0.3, ends.end).start()
    began = time.monotonic()
    with pytest.raises((TransportClosedError, RankError)):
        ends.receive(timeout_s=20)
    assert time.monotonic() - began < 2.5


WITH_GPUS = """
import ray
from dist_vlm.executor.transport_choice import TRANSPORTS
from dist_vlm.workers.serve import serve

@ray.remote(num_gpus=1)
class Rank:
    def step(self, plan):
        return plan.upper()

    def serve(self, path, token):
        serve(self.step, rank=0, path=path, token=token)

ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
for name, make in sorted(TRANSPORTS.items()):
    rank = Rank.remote()
    transport = make([rank], depth=2, send_timeout_s=20)
    transport.send(b"plan")
    print(name, transport.receive(20), flush=True)
    ray.kill(rank)
    transport.close()
"""


def test_a_rank_that_ray_gave_a_gpu_and_no_visible_devices_answers() -> None:
    """A declared GPU is enough: what fails is what Ray makes of the variables. In a process and a Ray of its own."""
    environment = os.environ | {
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, "-c", WITH_GPUS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.stdout == "".join(f"{name} [b'PLAN']\n" for name in sorted(TRANSPORTS)), done.stderr[-2000:]
