"""The front's end of a core in another process: the same as in a thread, and what becomes of requests when it dies."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from dist_vlm.config import EngineConfig
from dist_vlm.engine import process_client
from dist_vlm.engine.messages import EngineImage, EngineOutput, EngineRequest
from dist_vlm.engine.process_client import ProcessClient
from dist_vlm.executor.base import ExecutorError, StartError
from dist_vlm.executor.fake import checksum_token
from dist_vlm.workers.plan import ImageSpan, SamplingRow

WAIT_S = 30.0
NOTICE_S = 2.0

# A core process like the real one, but for its scripted ranks.
SCRIPTED = """
import sys
from dist_vlm.engine import core_process
from dist_vlm.engine.make_core import make_core
from dist_vlm.executor.base import ExecutorError, StartError
from dist_vlm.executor.fake import FakeExecutor
{setup}
core_process.make_core = lambda config: make_core(config, FakeExecutor(block_size=8, num_blocks=64, {script}))
core_process.main()
"""


def scripted_process(script: str = "", setup: str = "") -> tuple[str, ...]:
    return ("-c", SCRIPTED.format(script=script, setup=setup))


def request(name: str, *, max_tokens: int = 4, image: str | None = None) -> EngineRequest:
    prompt = tuple((sum(name.encode()) + i) % 1000 for i in range(6))
    array = np.ones((1, 3, 2, 2), np.float32)
    images = () if image is None else (EngineImage(ImageSpan(image, 1, 3), "pixel_values", array),)
    return EngineRequest(name, prompt, images, SamplingRow(), max_tokens, frozenset())


def scripted(one: EngineRequest) -> list[int]:
    tokens = list(one.prompt_token_ids)
    for _ in range(one.max_tokens):
        tokens.append(checksum_token(tokens, len(tokens)))
    return tokens[len(one.prompt_token_ids) :]


class Listener:
    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, list[tuple[str, object]]] = {}
        self._changed = threading.Condition()

    def __call__(self, outputs: list[EngineOutput]) -> None:
        with self._changed:
            for output in outputs:
                self.tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
                if output.finish_reason is not None:
                    self.ends.setdefault(output.request_id, []).append((output.finish_reason, output.stop_reason))
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout_s), "it did not come true in time"

    def ended(self, count: int, timeout_s: float = WAIT_S) -> set[tuple[str, object]]:
        """How the requests ended, once `count` have, each exactly once."""
        self.wait(lambda: len(self.ends) >= count, timeout_s)
        assert {len(ends) for ends in self.ends.values()} == {1}
        return {end for ends in self.ends.values() for end in ends}


@pytest.fixture
def make(engine_config: EngineConfig) -> Iterator[Callable[..., tuple[ProcessClient, Listener]]]:
    made: list[ProcessClient] = []

    def build(program: Sequence[str] | None = None) -> tuple[ProcessClient, Listener]:
        client = ProcessClient(engine_config) if program is None else ProcessClient(engine_config, program=program)
        made.append(client)
        listener = Listener()
        client.start(listener)
        return client, listener

    yield build
    for client in made:
        client.shutdown()


def test_tokens_and_statistics_cross_and_nothing_is_left(make: Callable[..., tuple[ProcessClient, Listener]]) -> None:
    client, listener = make()
    requests = [request(f"r{i}", image="x" if i % 2 else None) for i in range(20)]
    for one in requests:
        client.add(one)
    assert listener.ended(20) == {("length", None)}
    assert listener.tokens == {one.request_id: scripted(one) for one in requests}
    # The image of three tokens is encoded once or again, but the prompt's six tokens and three of the answer's are
    # scheduled for each request, less what the prefix cache had.
    state = client.state().result(WAIT_S)
    assert 20 * 3 < state.stats.num_scheduled_tokens <= 20 * 9
    assert (state.num_blocks, state.num_running, state.num_held_blocks, state.staged_bytes) == (64, 0, 0, 0)
    pid = client.pid
    client.shutdown()
    client.shutdown()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert client.dead is None
    client.add(request("late"))
    assert listener.ends["late"] == [("error", "the engine is shut down")]


def test_a_refused_request_and_an_abort_cross(make: Callable[..., tuple[ProcessClient, Listener]]) -> None:
    client, listener = make(scripted_process("step_delay_s=0.02"))
    client.add(request("huge", max_tokens=100_000))
    client.add(request("long", max_tokens=100))
    listener.wait(lambda: bool(listener.tokens.get("long")) and "huge" in listener.ends)
    ((reason, cause),) = listener.ends["huge"]
    assert reason == "error"
    assert "the KV cache holds 512" in str(cause)
    client.abort("long")
    client.abort("unknown")
    listener.wait(lambda: "long" in listener.ends)
    assert listener.ends["long"] == [("abort", None)]
    assert len(listener.tokens["long"]) < 100


def test_a_killed_process_ends_everything_within_two_seconds_by_name(
    make: Callable[..., tuple[ProcessClient, Listener]],
) -> None:
    client, listener = make(scripted_process("step_delay_s=0.02"))
    for i in range(6):
        client.add(request(f"r{i}", max_tokens=100))
    listener.wait(lambda: len(listener.tokens) >= 4)
    began = time.monotonic()
    os.kill(client.pid, signal.SIGKILL)
    (end,) = listener.ended(6, NOTICE_S)
    assert time.monotonic() - began < NOTICE_S
    assert end == ("error", f"engine process failed (no rank yet): the process {client.pid} was ended by signal 9")
    assert isinstance(client.dead, ExecutorError)
    client.add(request("late"))
    assert listener.ends["late"] == [end]
    for ask in (client.state, client.silence):
        with pytest.raises(ExecutorError, match="signal 9"):
            ask().result(NOTICE_S)
    assert client.ended().result(0) is client.dead


def test_a_lost_rank_is_named_across_the_process(make: Callable[..., tuple[ProcessClient, Listener]]) -> None:
    client, listener = make(scripted_process("fail_steps={3: ExecutorError('step', 'its process died', 1)}"))
    began = time.monotonic()
    for i in range(6):
        client.add(request(f"r{i}", max_tokens=100))
    assert listener.ended(6, NOTICE_S) == {("error", "step failed (rank 1): its process died")}
    assert time.monotonic() - began < NOTICE_S
    assert client.dead is not None
    assert (client.dead.stage, client.dead.cause, client.dead.rank) == ("step", "its process died", 1)


LOSES_RANK_1_ON_A_SIGNAL = """
import signal, time
LOST = ExecutorError('step', 'its process died', 1)
FakeExecutor.heard_at = lambda self: (time.monotonic(), time.monotonic() - 7.0)
start = FakeExecutor.start
def start_and_listen(self):
    signal.signal(signal.SIGUSR1, lambda *_: self.lose(LOST))
    return start(self)
FakeExecutor.start = start_and_listen
"""


def test_silence_crosses_and_a_process_that_stands_still_answers_when_it_goes_on_and_an_idle_death_is_told(
    make: Callable[..., tuple[ProcessClient, Listener]],
) -> None:
    client, listener = make(scripted_process("step_delay_s=1.0", LOSES_RANK_1_ON_A_SIGNAL))
    client.add(request("a", max_tokens=1))
    time.sleep(0.1)  # the step is under way
    heard, silent = client.silence().result(0.6)
    assert 0.0 <= heard < 1.0
    assert 7.0 <= silent < 8.0

    asked: list[None] = []
    client._silences._send = lambda: asked.append(client._ask_silence())  # type: ignore[func-returns-value]
    os.kill(client.pid, signal.SIGSTOP)
    given_up = [client.silence() for _ in range(100)]
    with pytest.raises(TimeoutError):
        given_up[-1].result(0.3)
    assert all(one.cancel() for one in given_up)
    late = client.silence()
    assert len(asked) == 1, "a process that does not answer is not asked again"
    os.kill(client.pid, signal.SIGCONT)
    assert 7.0 <= late.result(WAIT_S)[1] < 8.0
    assert len(asked) == 2

    assert listener.ended(1) == {("length", None)}
    began = time.monotonic()
    os.kill(client.pid, signal.SIGUSR1)
    dead = client.ended().result(NOTICE_S)
    assert time.monotonic() - began < NOTICE_S
    assert dead is not None
    assert (dead.stage, dead.cause, dead.rank) == ("step", "its process died", 1)


@pytest.mark.parametrize(
    ("program", "error", "text"),
    [
        (
            scripted_process(
                setup='FakeExecutor.start = lambda self: exec(\'raise StartError("load", "no file", 1)\')'
            ),
            StartError,
            r"load failed \(rank 1\): no file",
        ),
        (
            scripted_process(setup="def start(self): raise OSError('no disk')\nFakeExecutor.start = start"),
            StartError,
            r"start failed .*OSError: no disk",
        ),
        (scripted_process(setup="raise SystemExit(7)"), StartError, r"engine process failed .* ended with exit code 7"),
        (
            scripted_process(setup="import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
            StartError,
            r"engine process failed .* was ended by signal 9 before it was ready",
        ),
    ],
)
def test_a_start_that_fails_is_told_as_in_a_thread(
    engine_config: EngineConfig, program: tuple[str, ...], error: type[Exception], text: str
) -> None:
    client = ProcessClient(engine_config, program=program)
    with pytest.raises(error, match=text):
        client.start(Listener())
    with pytest.raises(ProcessLookupError):
        os.kill(client.pid, 0)


def test_a_start_that_never_ends_is_given_up(engine_config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_client, "_IMPORT_S", 0.3)
    monkeypatch.setattr(process_client, "_END_S", 0.3)
    parallel = dataclasses.replace(engine_config.parallel, start_timeout_s=0.2)
    client = ProcessClient(
        dataclasses.replace(engine_config, parallel=parallel), program=("-c", "import time; time.sleep(60)")
    )
    with pytest.raises(StartError, match=r"not ready 0\.3 s after start_timeout_s = 0\.2"):
        client.start(Listener())
    with pytest.raises(ProcessLookupError):
        os.kill(client.pid, 0)


def test_a_cache_too_small_is_a_value_error_here_too(engine_config: EngineConfig) -> None:
    cache = dataclasses.replace(engine_config.cache, num_gpu_blocks_override=8)
    client = ProcessClient(dataclasses.replace(engine_config, cache=cache))
    with pytest.raises(ValueError, match=r"the KV cache holds 64 tokens .* max_model_len = 128"):
        client.start(Listener())


def test_a_process_that_stands_still_does_not_hold_up_who_adds(
    make: Callable[..., tuple[ProcessClient, Listener]],
) -> None:
    """Images fill the socket's buffer, and nobody reads it."""
    client, listener = make()
    os.kill(client.pid, signal.SIGSTOP)
    try:
        array = np.zeros((1, 3, 336, 336), np.float32)
        began = time.monotonic()
        for i in range(10):
            image = EngineImage(ImageSpan(f"x{i}", 1, 3), "pixel_values", array)
            client.add(dataclasses.replace(request(f"r{i}"), images=(image,)))
            client.abort("r0")
        assert time.monotonic() - began < 1
    finally:
        os.kill(client.pid, signal.SIGCONT)
    listener.ended(10)
