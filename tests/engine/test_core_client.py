"""The books of a client, whatever it speaks with: each request ends once, in whichever order things happen."""

from __future__ import annotations

from typing import Any

import pytest

from dist_vlm.engine.core_client import CoreClient
from dist_vlm.engine.messages import EngineOutput, EngineRequest
from dist_vlm.executor.base import ExecutorError
from dist_vlm.sched.scheduler import SchedulerStats
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

    def _ask_stats(self) -> None:
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


def test_one_answer_serves_all_who_asked_for_statistics_and_an_end_too(client: Client) -> None:
    first, given_up, second = client.stats(), client.stats(), client.stats()
    assert client.num_asked == 3
    given_up.cancel()
    client._answer_stats(SchedulerStats(num_steps=5))
    assert first.result(0).num_steps == second.result(0).num_steps == 5
    third = client.stats()
    client._close("gone", LOST)
    for reply in (third, client.stats()):
        with pytest.raises(ExecutorError, match="gone"):
            reply.result(0)


def test_logits_processors_are_refused_unless_a_client_serves_them(client: Client) -> None:
    with pytest.raises(ValueError, match="logits_processors"):
        client.set_processors("a", [lambda token_ids, logits: logits])


def test_a_request_before_the_start_is_a_mistake_of_ours() -> None:
    client = Client()
    client.add(request("a"))
    with pytest.raises(RuntimeError, match="before start"):
        client._close("gone")
