"""The core in a thread: commands in, outputs out, each request ended once, whatever happens to the core."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from dist_vlm.engine.core_loop import CoreLoop
from dist_vlm.engine.messages import EngineImage, EngineOutput, EngineRequest
from dist_vlm.executor.base import ExecutorError
from dist_vlm.executor.fake import FakeExecutor, checksum_token
from dist_vlm.workers.plan import ImageSpan, SamplingRow

WAIT_S = 30.0
NOTICE_S = 2.0
LOST = ExecutorError("step", "its process died", 1)


def request(name: str, *, length: int = 5, max_tokens: int = 4, image: str | None = None) -> EngineRequest:
    prompt = tuple((sum(name.encode()) + i) % 1000 for i in range(length))
    array = np.zeros((1, 3, 2, 2), np.float32)
    images = () if image is None else (EngineImage(ImageSpan(image, 1, 3), "pixel_values", array),)
    return EngineRequest(name, prompt, images, SamplingRow(), max_tokens, frozenset())


def scripted(one: EngineRequest) -> list[int]:
    tokens = list(one.prompt_token_ids)
    for _ in range(one.max_tokens):
        tokens.append(checksum_token(tokens, len(tokens)))
    return tokens[len(one.prompt_token_ids) :]


class Listener:
    """Keeps what the core told, and when and how each request ended."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, tuple[str, object]] = {}
        self.ended_twice: list[str] = []
        self.threads: set[str] = set()
        self.num_calls = 0
        self._changed = threading.Condition()

    def __call__(self, outputs: list[EngineOutput]) -> None:
        with self._changed:
            self.num_calls += 1
            self.threads.add(threading.current_thread().name)
            for output in outputs:
                self.tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
                if output.finish_reason is not None:
                    if output.request_id in self.ends:
                        self.ended_twice.append(output.request_id)
                    self.ends[output.request_id] = (output.finish_reason, output.stop_reason)
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout_s), "it did not come true in time"

    def wait_for_ends(self, count: int, timeout_s: float = WAIT_S) -> None:
        self.wait(lambda: len(self.ends) >= count, timeout_s)
        assert not self.ended_twice


class Rig:
    def __init__(self, core: Any, executor: FakeExecutor) -> None:
        self.core, self.executor = core, executor
        self.loop, self.listener = CoreLoop(core), Listener()
        others = set(threading.enumerate())  # engines that other tests of this process keep
        self.loop.start(self.listener)
        (self.thread,) = [one for one in set(threading.enumerate()) - others if one.name == "engine-core"]

    def wait_until_idle(self) -> None:
        end = time.monotonic() + WAIT_S
        while self.core.has_work:
            assert time.monotonic() < end, "the core has work still"
            time.sleep(0.005)


@pytest.fixture
def make(make_core: Callable[..., Any]) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def build(**script: Any) -> Rig:
        executor = FakeExecutor(num_blocks=64, block_size=8, max_num_seqs=4, max_num_batched_tokens=64, **script)
        made.append(Rig(make_core(executor), executor))
        return made[-1]

    yield build
    for rig in made:
        rig.loop.shutdown()


def test_requests_from_several_threads_get_their_tokens(make: Callable[..., Rig]) -> None:
    rig = make(staging_polls=2)
    requests = [request(f"r{i}", length=5 + i % 7, image="x" if i % 3 == 0 else None) for i in range(40)]
    threads = [
        threading.Thread(target=lambda part: [rig.loop.add(one) for one in part], args=(requests[i::4],))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    rig.listener.wait_for_ends(40)
    assert rig.listener.tokens == {one.request_id: scripted(one) for one in requests}
    assert set(rig.listener.ends.values()) == {("length", None)}
    assert rig.listener.threads == {"engine-core"}


def test_a_request_the_core_refuses_ends_alone_with_its_reason(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.loop.add(request("huge", max_tokens=100_000))
    rig.loop.add(request("good"))
    rig.listener.wait_for_ends(2)
    reason, cause = rig.listener.ends["huge"]
    assert reason == "error"
    assert "the KV cache holds 512" in str(cause)
    assert rig.listener.tokens["good"] == scripted(request("good"))
    assert rig.loop.dead is None


def test_an_id_in_the_core_is_refused_at_the_door_and_free_again_after_its_end(make: Callable[..., Rig]) -> None:
    rig = make(step_delay_s=0.01)
    rig.loop.add(request("a", max_tokens=20))
    with pytest.raises(ValueError, match="'a' is in use"):
        rig.loop.add(request("a"))
    rig.listener.wait_for_ends(1)
    rig.listener.ends.clear()
    rig.loop.add(request("a"))
    rig.listener.wait_for_ends(1)


def test_abort_while_running_while_waiting_and_while_images_are_on_their_way(make: Callable[..., Rig]) -> None:
    rig = make(staging_polls=100_000, step_delay_s=0.005)
    for i in range(6):  # four slots
        rig.loop.add(request(f"r{i}", max_tokens=100))
    rig.loop.add(request("staging", image="x"))
    rig.listener.wait(lambda: len(rig.listener.tokens) >= 4)
    for name in [*(f"r{i}" for i in range(6)), "staging", "unknown", "r0"]:
        rig.loop.abort(name)
    rig.listener.wait_for_ends(7)
    assert set(rig.listener.ends.values()) == {("abort", None)}
    rig.wait_until_idle()
    assert rig.core.scheduler.pool.num_held == 0


def test_an_idle_loop_takes_no_time_and_wakes_at_once(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.loop.add(request("a"))
    rig.listener.wait_for_ends(1)
    rig.wait_until_idle()
    before = cpu_seconds(rig.thread)
    time.sleep(0.5)
    assert cpu_seconds(rig.thread) - before < 0.02, "it polls"
    began = time.monotonic()
    rig.loop.add(request("b", max_tokens=1))
    rig.listener.wait_for_ends(2)
    assert time.monotonic() - began < 0.2


def cpu_seconds(thread: threading.Thread) -> float:
    with open(f"/proc/self/task/{thread.native_id}/schedstat") as stat:
        return int(stat.read().split()[0]) / 1e9


def test_a_lost_rank_ends_everything_within_two_seconds_by_its_name(make: Callable[..., Rig]) -> None:
    rig = make(fail_steps={3: LOST}, staging_polls=10_000)
    began = time.monotonic()
    for i in range(6):
        rig.loop.add(request(f"r{i}", max_tokens=50))
    rig.loop.add(request("staging", image="x"))
    rig.listener.wait_for_ends(7, NOTICE_S)
    assert set(rig.listener.ends.values()) == {("error", "step failed (rank 1): its process died")}
    assert rig.loop.dead is LOST
    rig.loop.add(request("late"))
    rig.loop.abort("late")
    rig.listener.wait_for_ends(8, NOTICE_S)
    assert rig.listener.ends["late"] == ("error", "step failed (rank 1): its process died")
    assert time.monotonic() - began < 2 * NOTICE_S
    for ask in (rig.loop.state, rig.loop.silence):
        with pytest.raises(ExecutorError, match="rank 1"):
            ask().result(NOTICE_S)


@pytest.mark.parametrize("watched", [False, True])
def test_ranks_lost_while_idle_end_the_engine_within_two_seconds(make: Callable[..., Rig], watched: bool) -> None:
    """Whether or not somebody keeps asking it for its state."""
    rig = make()
    rig.loop.add(request("a"))
    rig.listener.wait_for_ends(1)
    ended, num_calls = rig.loop.ended(), rig.listener.num_calls
    began = time.monotonic()
    rig.executor.lose(LOST)
    while not ended.done() and time.monotonic() - began < NOTICE_S:
        time.sleep(0.01)
        if watched:
            rig.loop.state()
    assert ended.result(0) is rig.loop.dead is LOST
    rig.listener.wait(lambda: rig.listener.num_calls > num_calls)
    assert time.monotonic() - began < NOTICE_S
    assert list(rig.listener.ends) == ["a"]


@pytest.mark.parametrize("place", ["add", "abort", "step", "has_work"])
def test_a_defect_anywhere_in_the_core_ends_the_engine_by_name_but_not_by_its_text(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    rig = make(step_delay_s=0.01)
    rig.loop.add(request("a", max_tokens=100))
    rig.listener.wait(lambda: bool(rig.listener.tokens.get("a")))

    def fail(*_: object) -> None:
        raise IndexError("secret 0x7f00")

    monkeypatch.setattr(type(rig.core), place, property(fail) if place == "has_work" else fail)
    if place == "abort":
        rig.loop.abort("a")
    rig.loop.add(request("b"))
    rig.listener.wait_for_ends(2, NOTICE_S)
    assert set(rig.listener.ends.values()) == {("error", str(rig.loop.dead))}
    assert "the engine was broken off by IndexError" in str(rig.loop.dead)
    assert "secret" not in str(rig.loop.dead)
    assert "secret 0x7f00" in caplog.text


def test_shutdown_ends_what_runs_and_the_thread(make: Callable[..., Rig]) -> None:
    rig = make(step_delay_s=0.01)
    rig.loop.add(request("a", max_tokens=100))
    rig.listener.wait(lambda: bool(rig.listener.tokens.get("a")))
    threading.Thread(target=rig.loop.shutdown).start()
    rig.loop.shutdown()
    assert rig.listener.ends == {"a": ("error", "the engine is shut down")}
    assert not rig.thread.is_alive()
    assert rig.loop.dead is None
    rig.loop.add(request("b"))
    assert rig.listener.ends["b"] == ("error", "the engine is shut down")
    for ask in (rig.loop.state, rig.loop.silence):
        with pytest.raises(ExecutorError, match="shut down"):
            ask().result(NOTICE_S)
    assert rig.loop.ended().result(0) is None
    assert not rig.listener.ended_twice


def test_a_step_that_does_not_return_does_not_hold_up_a_shutdown(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make()
    broken_off = threading.Event()

    def step() -> list[EngineOutput]:
        broken_off.wait(30)
        raise ExecutorError("step", "the executor is shut down")

    monkeypatch.setattr(rig.core, "step", step)
    monkeypatch.setattr(rig.core, "shutdown", broken_off.set)
    rig.loop.add(request("a"))
    began = time.monotonic()
    rig.loop.shutdown()
    assert time.monotonic() - began < 5
    assert rig.listener.ends == {"a": ("error", "the engine is shut down")}
    assert not rig.thread.is_alive()


def test_the_state_is_the_cores(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.loop.add(request("a"))
    rig.listener.wait_for_ends(1)
    state = rig.loop.state().result(NOTICE_S)
    # Five of the prompt, and every token but the last, which nothing follows.
    assert state.stats.num_scheduled_tokens == 5 + 3
    assert (state.num_blocks, state.num_running, state.num_held_blocks, state.num_cached_blocks) == (64, 0, 0, 1)


def test_silence_is_told_during_a_step_and_the_state_after_it(make: Callable[..., Rig]) -> None:
    rig = make(step_delay_s=0.5, num_ranks=2)
    rig.loop.add(request("a", max_tokens=1))
    while not rig.executor.plans:
        time.sleep(0.001)
    rig.executor.silent_since[1] = time.monotonic() - 7.0
    began = time.monotonic()
    state, silence = rig.loop.state(), rig.loop.silence()
    heard, silent = silence.result(0)
    assert heard < 0.2
    assert 7.0 <= silent < 7.5
    assert time.monotonic() - began < 0.2
    assert not state.done()
    assert state.result(NOTICE_S).stats.num_steps == 1
    rig.listener.wait_for_ends(1)
