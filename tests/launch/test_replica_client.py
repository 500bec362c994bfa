"""Two replicas of two CPU ranks on a cluster of three nodes, against one engine in this process."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from PIL import Image
from ray import serve
from three_nodes import Nodes, started

from dist_vlm import LLM, SamplingParams
from dist_vlm.async_llm import AsyncLLM
from dist_vlm.config import EngineConfig, resolve
from dist_vlm.engine import core_messages as messages
from dist_vlm.engine.messages import EngineOutput, EngineRequest
from dist_vlm.engine.state import EngineState
from dist_vlm.executor.base import StartError
from dist_vlm.launch import cli
from dist_vlm.launch.replica_affinity import Claim
from dist_vlm.launch.replica_client import ReplicaClient, _Reports
from dist_vlm.launch.replica_report import ReplicaReport
from dist_vlm.sched.scheduler import SchedulerStats
from dist_vlm.workers.plan import SamplingRow

CHECKPOINT = Path(__file__).parents[2] / "examples" / "demo" / "checkpoint"
pytestmark = pytest.mark.timeout(400)

NUM_PICTURES = 20
QUESTIONS = ("What is in the picture?", "How many shapes are there?", "Which colour is the circle?", "What is left?")
# Greedy, and drawn with a seed: both must be what one engine answers.
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, seed=3, presence_penalty=0.5, max_tokens=48, ignore_eos=True)
WAIT_S = 120.0


@pytest.fixture(scope="module")
def fields() -> dict[str, Any]:
    return {
        "model": str(CHECKPOINT), "dtype": "float32", "device": "cpu", "kernels": "torch", "max_model_len": 512,
        "max_num_seqs": 16, "kv_cache_memory_gib": 0.125, "threads_per_rank": 1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with started(num_nodes=2, node_cpus=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(nodes: Nodes, fields: dict[str, Any]) -> ReplicaClient:
    config = EngineConfig.from_fields(
        **fields, tensor_parallel_size=2, replicas=2, ray_address=nodes.address, replica_drain_timeout_s=1.0
    )
    return ReplicaClient(resolve(config))


@pytest.fixture(scope="module")
def llm(client: ReplicaClient) -> Iterator[AsyncLLM]:
    llm = AsyncLLM.from_config(client._config, client=client)
    yield llm
    llm.shutdown()


@pytest.fixture(scope="module")
def single(fields: dict[str, Any]) -> Iterator[LLM]:
    llm = LLM(**fields, executor="inline")
    yield llm
    llm.shutdown()


def picture(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST)


def prompt(number: int, question: str) -> dict[str, Any]:
    return {"prompt": f"<image>\nUSER: {question}\nASSISTANT:", "multi_modal_data": {"image": picture(number)}}


PROMPTS = [
    prompt(number, random.Random(7 * index).choice(QUESTIONS) + f" ({index})")
    for index, number in enumerate(random.Random(0).choices(range(NUM_PICTURES), k=400))
]


async def answers(llm: AsyncLLM, prompts: list[Any], params: SamplingParams, *, at_once: int) -> list[Any]:
    seats = asyncio.Semaphore(at_once)

    async def one(inputs: Any) -> Any:
        async with seats:
            return [output async for output in llm.generate(inputs, params)][-1]

    return await asyncio.gather(*map(one, prompts))


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.outputs[0].token_ids for output in outputs]


def tokens_done(client: ReplicaClient) -> dict[str, int]:
    """Prompt and answer tokens of each replica, computed or found in its cache."""
    return {
        report.replica_id: report.state.stats.num_scheduled_tokens + report.state.stats.num_hit_tokens
        for report in client.reports()
    }


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def replica_groups() -> dict[str, list[str]]:
    """Placement group -> the nodes of its bundles, of the groups that exist."""
    table = ray.util.placement_group_table().values()
    return {
        group["placement_group_id"]: list(group["bundles_to_node_id"].values())
        for group in table
        if group["state"] == "CREATED"
    }


def test_each_replica_has_a_node_of_its_own_and_its_ranks_are_in_its_group(llm: AsyncLLM, nodes: Nodes) -> None:
    groups = replica_groups()
    assert sorted(map(len, groups.values())) == [3, 3], "an engine and two ranks; the ranks asked for no others"
    places = {tuple(set(bundles)) for bundles in groups.values()}
    assert places == {(node.node_id,) for node in nodes.nodes}


def test_requests_meet_the_replica_that_has_their_picture_and_answers_are_one_engines(
    llm: AsyncLLM, client: ReplicaClient, single: LLM
) -> None:
    before = sum(tokens_done(client).values())
    outputs = asyncio.run(answers(llm, PROMPTS, GREEDY, at_once=6))
    expected = single.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert tokens_of(outputs) == tokens_of(expected)
    cached, of_one = (sum(output.num_cached_tokens for output in many) for many in (outputs, expected))
    assert of_one > 0.5 * sum(len(output.prompt_token_ids) for output in expected), "there is something to be found"
    assert cached >= 0.9 * of_one
    # Each request's last token is never computed.
    total = sum(len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1 for output in outputs)
    wait_until(lambda: sum(tokens_done(client).values()) - before >= total, "the replicas tell what they did")
    assert min(tokens_done(client).values()) >= 0.4 * total


def test_the_state_is_that_of_all_replicas(llm: AsyncLLM, client: ReplicaClient) -> None:
    state = asyncio.run(llm.state())
    assert state.stats.num_scheduled_tokens + state.stats.num_hit_tokens == sum(tokens_done(client).values())
    assert state.num_blocks == sum(report.state.num_blocks for report in client.reports())
    silence = asyncio.run(llm.silence_s())
    assert len(silence) == 2 and max(silence) < 10


def test_an_aborted_request_is_aborted_in_its_replica(llm: AsyncLLM, client: ReplicaClient) -> None:
    async def leave() -> None:
        stream = llm.generate(PROMPTS[0], SamplingParams(max_tokens=400, ignore_eos=True))
        await anext(stream)
        await stream.aclose()

    before = sum(tokens_done(client).values())
    asyncio.run(leave())
    wait_until(lambda: sum(tokens_done(client).values()) > before, "it ran")
    wait_until(lambda: asyncio.run(llm.state()).num_running == 0, "it still runs")
    assert asyncio.run(llm.state()).num_held_blocks == 0


def test_a_node_lost_under_load_costs_no_request_and_the_replica_returns_with_a_node(
    llm: AsyncLLM, client: ReplicaClient, single: LLM, nodes: Nodes
) -> None:
    prompts = PROMPTS[:60]
    expected = tokens_of(single.generate(prompts, DRAWN, use_tqdm=False))
    (before,) = [{report.replica_id for report in client.reports()}]

    async def run() -> list[Any]:
        running = asyncio.ensure_future(answers(llm, prompts, DRAWN, at_once=60))
        await asyncio.sleep(0.7)
        assert llm.num_unfinished >= 20, "the node goes while many are under way"
        await asyncio.to_thread(nodes.remove, nodes.nodes.pop())
        return await running

    assert tokens_of(asyncio.run(run())) == expected
    wait_until(lambda: len(client.reports()) == 1, "the lost replica is still counted")
    nodes.nodes.append(nodes.add())
    wait_until(lambda: len(client.reports()) == 2, "no replica came with the new node")
    assert len({report.replica_id for report in client.reports()} - before) == 1


def test_all_replicas_are_replaced_under_load_without_a_failed_request(
    llm: AsyncLLM, client: ReplicaClient, single: LLM, nodes: Nodes, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = PROMPTS[:16]
    expected = tokens_of(single.generate(prompts, DRAWN, use_tqdm=False))
    before = {report.replica_id for report in client.reports()}

    async def load(stop: asyncio.Event) -> AsyncIterator[list[list[int]]]:
        while not stop.is_set():
            yield tokens_of(await answers(llm, prompts, DRAWN, at_once=4))

    async def run() -> list[list[list[int]]]:
        stop = asyncio.Event()
        rounds = asyncio.ensure_future(_all(load(stop)))
        await asyncio.sleep(0.5)
        status = await asyncio.to_thread(cli.main, ["restart", "--ray-address", nodes.address])
        assert status == 0
        end = time.monotonic() + WAIT_S
        while len({report.replica_id for report in client.reports()} - before) < 2:
            assert time.monotonic() < end, "the replicas were not replaced"
            await asyncio.sleep(0.2)
        stop.set()
        return await rounds

    rounds = asyncio.run(run())
    assert len(rounds) > 1
    assert all(tokens == expected for tokens in rounds)
    assert "the replicas of dist-vlm are replaced" in capsys.readouterr().out


async def _all(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


def test_a_restart_names_a_server_that_is_not_there(
    llm: AsyncLLM, nodes: Nodes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["restart", "--ray-address", nodes.address, "--app-name", "other"]) == 1
    assert "app_name = 'other': no server of this name" in capsys.readouterr().err


def test_a_second_server_of_the_name_is_refused(llm: AsyncLLM, client: ReplicaClient) -> None:
    with pytest.raises(StartError, match="app_name = 'dist-vlm': a server of this name runs in the cluster"):
        AsyncLLM.from_config(client._config, client=ReplicaClient(client._config))
    assert asyncio.run(llm.state()).num_blocks, "the first one goes on"


def test_what_no_node_could_hold_is_told_at_once(llm: AsyncLLM, client: ReplicaClient) -> None:
    config = client._config.replace(tensor_parallel_size=4, app_name="large")
    began = time.monotonic()
    with pytest.raises(
        StartError, match=r"a replica needs 5 CPU, 0 GPU on one machine; Ray has, a machine: .*3 CPU, 0 GPU"
    ):
        AsyncLLM.from_config(config, client=ReplicaClient(config))
    assert time.monotonic() - began < 20


def test_what_does_not_come_free_is_told_at_the_deadline(llm: AsyncLLM, client: ReplicaClient) -> None:
    config = client._config.replace(app_name="late", start_timeout_s=5)
    with pytest.raises(StartError, match=r"0 of 2 replicas run after .*; each asks for 3 CPU, 0 GPU .*; free in the"):
        AsyncLLM.from_config(config, client=ReplicaClient(config))
    wait_until(lambda: "late" not in serve.status().applications, "it is deleted")


_SERVER = """
import sys, json
from dist_vlm.async_llm import AsyncLLM
from dist_vlm.config import EngineConfig, resolve
from dist_vlm.launch.replica_client import ReplicaClient
config = resolve(EngineConfig.from_fields(**json.loads(sys.argv[1])))
llm = AsyncLLM.from_config(config, client=ReplicaClient(config))
print("ready", flush=True)
sys.stdin.read()
"""


def test_replicas_end_with_their_server_however_it_ends(llm: AsyncLLM, nodes: Nodes, fields: dict[str, Any]) -> None:
    nodes.nodes.append(nodes.add())
    scripted = fields | {"executor": "fake", "start_timeout_s": 60, "app_name": "killed", "ray_address": nodes.address}
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER, json.dumps(scripted)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        assert "killed" in serve.status().applications
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: "killed" not in serve.status().applications, "its replicas are still there")
    finally:
        server.kill()
        server.communicate()
    assert asyncio.run(llm.state()).num_blocks, "the other server's are untouched"


def test_the_ranks_may_be_on_another_machine_than_their_driver(
    llm: AsyncLLM, single: LLM, nodes: Nodes, fields: dict[str, Any]
) -> None:
    """The head, where this process is, has no room for two ranks: plans and pictures go to another machine."""
    nodes.nodes.append(nodes.add())
    with LLM(**fields, tensor_parallel_size=2, ray_address=nodes.address) as apart:
        (group,) = [places for places in replica_groups().values() if len(places) == 2]
        assert set(group) < {node.node_id for node in nodes.nodes}
        outputs = apart.generate(PROMPTS[:20], DRAWN, use_tqdm=False)
    assert tokens_of(outputs) == tokens_of(single.generate(PROMPTS[:20], DRAWN, use_tqdm=False))


# ---- what becomes of one request, over scripted replicas ----


class Scripted:
    """A handle whose every call is answered by the next script: outputs, then an error to raise, or the end."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts = list(scripts)
        self.sent: list[messages.Add] = []
        self.num_cancelled = 0

    def remote(self, frame: bytes, *, claim: Claim) -> Scripted:
        sent = messages.unpack(frame)
        assert isinstance(sent, messages.Add)
        self.sent.append(sent)
        assert claim.num_tokens == len(sent.prompt_token_ids) + len(sent.output_token_ids)
        self._script = self.scripts.pop(0)
        return self

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for step in self._script:
            if isinstance(step, BaseException):
                raise step
            if isinstance(step, float):
                await asyncio.sleep(step)
                continue
            output = EngineOutput("a", new_token_ids=step[:-1], finish_reason=step[-1])
            yield messages.pack(messages.Outputs((messages.output_message(output),)))

    def cancel(self) -> None:
        self.num_cancelled += 1


def told_by(*scripts: list[Any], abort_after_s: float | None = None) -> tuple[list[EngineOutput], Scripted]:
    """What a client is told of one request, until its end."""
    told: list[EngineOutput] = []
    over = threading.Event()

    def take(outputs: list[EngineOutput]) -> None:
        told.extend(outputs)
        if any(output.finish_reason for output in outputs):
            over.set()

    client = ReplicaClient(EngineConfig.from_fields(model="/m", device="cpu"))
    client._on_outputs = take
    client._handle = handle = Scripted(*scripts)
    client._thread.start()
    client.add(EngineRequest("a", (1, 2, 3), (), SamplingRow(), 9, frozenset()))
    if abort_after_s is not None:
        time.sleep(abort_after_s)
        client.abort("a")
    assert over.wait(10)
    client.shutdown()
    return told, handle


def test_a_broken_stream_is_sent_again_with_what_it_told() -> None:
    lost = RuntimeError("the replica's engine has ended")
    told, handle = told_by([(5, 6, None), lost], [(7, None)], [(8, 9, "length")])
    assert [output.new_token_ids for output in told] == [(5, 6), (7,), (8, 9)]
    assert [output.finish_reason for output in told] == [None, None, "length"]
    assert [sent.output_token_ids for sent in handle.sent] == [(), (5, 6), (5, 6, 7)]
    assert handle.num_cancelled == 2, "a stream that is over needs no cancelling"


def test_a_request_that_ends_every_replica_is_given_up() -> None:
    lost = RuntimeError("gone")
    told, handle = told_by([(5, None), lost], [lost], [(6, None), lost], [lost], [lost], [(7, "length")])
    assert [output.new_token_ids for output in told[:2]] == [(5,), (6,)], "one that gets on is not given up"
    assert (told[2].finish_reason, told[2].stop_reason) == ("error", "3 replicas in a row were lost with the request")
    assert len(handle.sent) == 5


def test_a_cancellation_over_there_is_no_abort_here() -> None:
    told, _ = told_by([(5, None), asyncio.CancelledError()], [(6, "stop")])
    assert [output.finish_reason for output in told] == [None, "stop"]


@pytest.mark.parametrize("after_s", [0.0, 0.3])
def test_an_abort_ends_the_request_whenever_it_comes(after_s: float) -> None:
    told, handle = told_by([(5, None), 30.0], abort_after_s=after_s)
    assert [output.finish_reason for output in told if output.finish_reason] == ["abort"]
    assert handle.num_cancelled == len(handle.sent)


def test_a_replica_that_is_gone_counts_on_once() -> None:
    def report(name: str, steps: int) -> ReplicaReport:
        state = EngineState(SchedulerStats(num_steps=steps), 1, 0, 0, 10, 2, 0, 0, None, 0, 0, 0)
        return ReplicaReport(name, state, (0.5, float(steps)))

    reports = _Reports()
    reports.take([report("x", 3), report("y", 4)])
    assert (reports.state().stats.num_steps, reports.state().num_blocks) == (7, 20)
    assert reports.silence()[1] == pytest.approx(3, abs=0.2), "the one that was heard last"
    reports.take([report("y", 5)])
    assert (reports.state().stats.num_steps, reports.state().num_blocks) == (8, 10)
    reports.take([report("x", 4), report("y", 5)])
    assert reports.state().stats.num_steps == 9, "it was only out of sight"
    reports.take([])
    assert reports.state().stats.num_steps == 9 and reports.state().num_running == 0
    assert len(reports.silence()) == 1
