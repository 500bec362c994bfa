"""The thread of a rank in this process: order, interrupts, ends."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable

import pytest

from dist_vlm.executor.thread_transport import ThreadTransport
from dist_vlm.executor.transport import TransportClosedError, TransportTimeoutError
from dist_vlm.workers.failure import RankError


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("inline-rank")]


def test_messages_and_calls_run_in_one_thread_in_their_order() -> None:
    seen: list[tuple[object, int]] = []

    def step(message: bytes) -> bytes:
        seen.append((message, threading.get_ident()))
        if message == b"bad":
            raise RankError(0, "step", "ValueError: no")
        return message.upper()

    transport = ThreadTransport(step, depth=3)
    transport.send(b"a")
    transport.post(lambda: seen.append(("posted", threading.get_ident())))
    transport.send(b"bad")
    transport.send(b"c")
    with pytest.raises(RuntimeError, match="3 messages are unanswered"):
        transport.send(b"d")
    assert transport.call(len, "four") == 4
    assert [what for what, _ in seen] == [b"a", "posted", b"bad", b"c"]
    (ident,) = {ident for _, ident in seen}
    assert ident != threading.get_ident()
    assert transport.receive(9) == [b"A"]
    with pytest.raises(RankError, match="rank 0, step: ValueError: no"):
        transport.receive(9)
    transport.close()
    assert not running()


def test_a_message_that_takes_long_is_a_timeout_and_close_waits_for_it() -> None:
    gate, ended, dropped = threading.Event(), threading.Event(), threading.Event()

    def step(message: bytes) -> bytes:
        if message == b"second":
            dropped.set()
        assert gate.wait(20)
        ended.set()
        return message

    transport = ThreadTransport(step, depth=2)
    transport.send(b"first")
    transport.send(b"second")
    with pytest.raises(TransportTimeoutError):
        transport.receive(0.05)
    threading.Timer(0.2, gate.set).start()
    transport.close()
    transport.close()
    assert ended.is_set()
    assert not dropped.is_set(), "what was behind it has not begun"
    # The answer that came is still read; the dropped message has none.
    assert transport.receive(9) == [b"first"]
    with pytest.raises(TransportClosedError):
        transport.receive(9)
    with pytest.raises(TransportClosedError):
        transport.send(b"third")
    assert not running()


def test_it_tells_since_when_what_runs_has_run() -> None:
    gate = threading.Event()
    transport = ThreadTransport(lambda message: b"" if gate.wait(20) else message, depth=2)
    assert transport.busy_since is None
    before = time.monotonic()
    transport.send(b"first")
    transport.send(b"second")
    until(lambda: transport.busy_since is not None)
    first = transport.busy_since
    assert first is not None
    assert before <= first <= time.monotonic()
    time.sleep(0.02)
    assert transport.busy_since == first, "since the first began, though the second waits behind it"
    gate.set()
    until(lambda: transport.busy_since is None)

    seen: list[float | None] = []
    with pytest.raises(ZeroDivisionError):
        transport.call(lambda: seen.append(transport.busy_since) or 1 / 0)
    (second,) = seen
    assert second is not None
    assert second > first
    until(lambda: transport.busy_since is None)
    transport.close()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.002)


def test_it_can_be_closed_in_its_own_thread() -> None:
    transport = ThreadTransport(bytes.upper, depth=1)
    transport.call(transport.close)
    transport.close()
    assert not running()


def test_the_thread_ends_with_the_last_reference() -> None:
    transport = ThreadTransport(bytes.upper, depth=1)
    transport.send(b"a")
    assert transport.receive(9) == [b"A"]
    assert len(running()) == 1
    del transport
    gc.collect()
    end = time.monotonic() + 5
    while running() and time.monotonic() < end:
        time.sleep(0.01)
    assert not running()
