"""One replica without Serve, over scripted ranks: what goes in and comes out, and what ends it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_vlm.config import EngineConfig, resolve
from dist_vlm.engine import core_messages as messages
from dist_vlm.engine.messages import EngineOutput
from dist_vlm.executor.fake import FakeExecutor, checksum_token
from dist_vlm.launch import replica_report
from dist_vlm.launch.replica import EngineReplica
from dist_vlm.workers.plan import SamplingRow, StepResult
from dist_vlm.workers.wire import WireError

PROMPT = (5, 6, 7, 8)


@pytest.fixture
def config(tiny_facts: Path) -> EngineConfig:
    return resolve(
        EngineConfig.from_fields(
            model=str(tiny_facts), device="cpu", executor="fake", max_model_len=128, max_num_seqs=8,
            num_gpu_blocks_override=64, replica_health_timeout_s=1.5,
        )
    )  # fmt: skip


@pytest.fixture
def replica(config: EngineConfig) -> Iterator[EngineReplica]:
    replica = EngineReplica(json.dumps(config.fields()))
    yield replica
    replica._core.shutdown()


def frame(name: str, *, max_tokens: int = 12, told: tuple[int, ...] = ()) -> bytes:
    return messages.pack(messages.Add(name, PROMPT, (), SamplingRow(), max_tokens, (), 0, "", told, 0))


def expected(count: int) -> list[int]:
    tokens = list(PROMPT)
    for _ in range(count):
        tokens.append(checksum_token(tokens, len(tokens)))
    return tokens[len(PROMPT) :]


async def outputs_of(replica: EngineReplica, sent: bytes) -> list[EngineOutput]:
    found = []
    async for part in replica.generate(sent):
        message = messages.unpack(part)
        assert isinstance(message, messages.Outputs) and message.outputs
        found += [messages.output_of(one) for one in message.outputs]
    return found


def tokens_of(outputs: list[EngineOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


def test_a_request_streams_to_its_end_under_its_own_name(replica: EngineReplica) -> None:
    outputs = asyncio.run(outputs_of(replica, frame("a")))
    assert tokens_of(outputs) == expected(12)
    assert {output.request_id for output in outputs} == {"a"}
    assert [output.finish_reason for output in outputs if output.finish_reason] == ["length"]


def test_one_that_was_begun_elsewhere_goes_on(replica: EngineReplica) -> None:
    outputs = asyncio.run(outputs_of(replica, frame("a", told=tuple(expected(5)))))
    assert tokens_of(outputs) == expected(12)[5:]


def test_the_same_request_sent_twice_is_two(replica: EngineReplica) -> None:
    """A stream that broke may still be in the engine when the request comes again."""

    async def run() -> list[list[EngineOutput]]:
        return await asyncio.gather(*(outputs_of(replica, frame("a")) for _ in range(6)))

    assert [tokens_of(outputs) for outputs in asyncio.run(run())] == [expected(12)] * 6


def test_closing_the_stream_aborts_the_request(replica: EngineReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = FakeExecutor.collect

    def slow(self: FakeExecutor) -> StepResult:
        time.sleep(0.05)
        return sound(self)

    monkeypatch.setattr(FakeExecutor, "collect", slow)

    async def run() -> Any:
        stream = replica.generate(frame("a", max_tokens=100))
        await anext(stream)
        await stream.aclose()
        async with asyncio.timeout(10):
            # A step that names it may be under way.
            while (state := await asyncio.wrap_future(replica._core.state())).num_held_blocks:
                await asyncio.sleep(0.01)
        return state

    state = asyncio.run(run())
    assert (state.num_running, replica._streams) == (0, {})
    assert state.stats.num_scheduled_tokens < 90, "it ran to its end"


def test_a_request_that_the_engine_refuses_ends_alone(replica: EngineReplica) -> None:
    (output,) = asyncio.run(outputs_of(replica, frame("a", max_tokens=5000)))
    assert output.finish_reason == "error" and "the KV cache holds" in str(output.stop_reason)
    assert tokens_of(asyncio.run(outputs_of(replica, frame("b")))) == expected(12)


@pytest.mark.parametrize("sent", [b"", b"\xff", messages.pack(messages.Abort("a"))])
def test_what_is_no_request_is_refused(replica: EngineReplica, sent: bytes) -> None:
    with pytest.raises(WireError):
        asyncio.run(outputs_of(replica, sent))


def test_what_it_tells_of_itself(replica: EngineReplica) -> None:
    asyncio.run(outputs_of(replica, frame("a")))
    report = replica_report.read("r", asyncio.run(replica.record_routing_stats()))
    assert report is not None
    assert report.state.num_blocks == 64
    assert report.state.stats.num_scheduled_tokens == len(PROMPT) + 11
    assert len(report.silence) == 1
    started = messages.unpack(asyncio.run(replica.info()))
    assert isinstance(started, messages.Started) and started.info.num_blocks == 64


def test_its_health_is_its_ranks(replica: EngineReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(replica.check_health())
    monkeypatch.setattr(replica._core._core, "silence", lambda: (0.1, 1.6))
    with pytest.raises(RuntimeError, match=r"rank 1 finished no step and answered no ping for 1\.6 s"):
        asyncio.run(replica.check_health())


_DYING = """
import asyncio, sys
from dist_vlm.executor.base import ExecutorError
from dist_vlm.executor.fake import FakeExecutor
from dist_vlm.launch.replica import EngineReplica

def collect(self):
    raise ExecutorError("step", "its process died", 0)

FakeExecutor.collect = collect
replica = EngineReplica(sys.argv[1])

async def run():
    async for part in replica.generate(bytes.fromhex(sys.argv[2])):
        print("answered", flush=True)

asyncio.run(run())
print("went on", flush=True)
"""


def test_its_process_ends_with_its_engine_and_the_request_gets_no_error(config: EngineConfig) -> None:
    """An error would end the request; a broken stream is taken up by another replica."""
    words = [sys.executable, "-c", _DYING, json.dumps(config.fields()), frame("a").hex()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "the replica ends, its engine has: step failed (rank 0): its process died" in done.stderr
