"""The books of a client, whatever it speaks with: each request ends once, in whichever order things happen."""

from __future__ import annotations

from typing import Any

import pytest

from dist_vlm.engine.core_client import CoreClient
from dist_vlm.engine.messages import EngineOutput, EngineRequest
from dist_vlm.executor.base import ExecutorError
from dist_vlm.workers.plan import SamplingRow

LOST = ExecutorError("step", "gone", 0)


class Client(CoreClient):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []
        self.told: list[EngineOutput] = []
        self.num_asked = 0

    def abort(self, request_id: str) -> None: ...

    def shutdown(self) -> None: ...

    def _start(self) -> Any: ...

    def _send_request(self, request: EngineRequest) -> None:
        self.sent.append(request.request_id)

    def silence(self) -> Any: ...

    def _ask_state(self) -> None:
        self.num_asked += 1


@pytest.fixture
def client() -> Client:
    made = Client()
    made.start(made.told.extend)
    return made


def request(name: str) -> EngineRequest:
    return EngineRequest(name, (1,), (), SamplingRow(), 1, frozenset())


def test_news_after_the_end_and_ends_after_the_end_are_not_told(client: Client) -> None:
    for name in "abc":
        client.add(request(name))
    client._tell([EngineOutput("a", (1,)), EngineOutput("b", (2,), finish_reason="stop"), EngineOutput("x", (3,))])
    client._tell([EngineOutput("b", (9,), finish_reason="abort")])
    client._close("gone", LOST)
    client._close("shut down")
    client._tell([EngineOutput("a", (4,), finish_reason="length")])
    assert [(one.request_id, one.finish_reason, one.stop_reason) for one in client.told] == [
        ("a", None, None),
        ("b", "stop", None),
        ("a", "error", "gone"),
        ("c", "error", "gone"),
    ]
    assert client.dead is LOST, "the first cause stays"
    client.add(request("late"))
    client.add(request("late"))
    assert [one.stop_reason for one in client.told[4:]] == ["gone", "gone"]
    assert client.sent == ["a", "b", "c"]


def test_an_id_is_in_use_until_its_end_was_told(client: Client) -> None:
    client.add(request("a"))
    with pytest.raises(ValueError, match="'a' is in use"):
        client.add(request("a"))
    client._tell([EngineOutput("a", finish_reason="stop")])
    client.add(request("a"))
    assert client.sent == ["a", "a"]


def test_the_end_is_the_answer_to_those_who_ask_for_the_state(client: Client) -> None:
    before = client.state()
    assert client.num_asked == 1
    assert client._end_error() is None
    client._close("gone", LOST)
    for reply in (before, client.state()):
        with pytest.raises(ExecutorError) as caught:
            reply.result(0)
        assert caught.value is LOST
    assert client._end_error() is LOST
    assert client.num_asked == 1


def test_after_a_shutdown_the_state_is_an_error_that_says_so(client: Client) -> None:
    before = client.state()
    client._close("the engine is shut down")
    for reply in (before, client.state()):
        with pytest.raises(ExecutorError, match="engine failed .*: the engine is shut down"):
            reply.result(0)
    assert str(client._end_error()) == "engine failed (no rank yet): the engine is shut down"


@pytest.mark.parametrize("dead", [LOST, None])
def test_the_end_is_told_to_all_who_wait_for_it_and_once(client: Client, dead: ExecutorError | None) -> None:
    waiting, given_up = [client.ended() for _ in range(3)], client.ended()
    for _ in range(100):
        client.ended().cancel()
    assert len(client._watchers) <= 5
    given_up.cancel()
    assert not any(one.done() for one in waiting)
    client._close("gone", dead)
    client._close("gone again", ExecutorError("step", "another"))
    assert [one.result(0) for one in (*waiting, client.ended())] == [dead] * 4


def test_logits_processors_are_refused_unless_a_client_serves_them(client: Client) -> None:
    with pytest.raises(ValueError, match="logits_processors"):
        client.set_processors("a", [lambda token_ids, logits: logits])


def test_a_request_before_the_start_is_a_mistake_of_ours() -> None:
    client = Client()
    client.add(request("a"))
    with pytest.raises(RuntimeError, match="before start"):
        client._close("gone")
