"""Ranks that are lost and replaced: every request goes on with the tokens it has, and ends once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_vlm.engine.core import EngineCore
from dist_vlm.engine.messages import EngineRequest
from dist_vlm.executor.base import ExecutorError
from dist_vlm.executor.fake import FakeExecutor
from dist_vlm.workers.plan import SamplingRow, StepPlan

from .test_core import drain, expected, request

LOST = ExecutorError("step", "the process ended", 1)


def engine(
    *, max_restarts: int = 9, depth: int = 2, kind: type[FakeExecutor] = FakeExecutor, **script: Any
) -> tuple[EngineCore, FakeExecutor]:
    sizes = {"block_size": 4, "max_num_seqs": 3, "max_num_batched_tokens": 8}
    executor = kind(num_blocks=16, **sizes, **{"restarts": 9, **script})
    core = EngineCore(
        executor, max_model_len=64, depth=depth, feature_rows=12, max_restarts=max_restarts, **sizes
    )  # fmt: skip
    core.start()
    return core, executor


@settings(max_examples=150)
@given(
    lengths=st.lists(st.integers(4, 20), min_size=1, max_size=7),
    lost_at=st.integers(0, 12),
    depth=st.integers(1, 3),
    staging_polls=st.integers(0, 6),
    data=st.data(),
)
def test_answers_are_those_of_ranks_that_were_never_lost(
    lengths: list[int], lost_at: int, depth: int, staging_polls: int, data: st.DataObject
) -> None:
    requests = [
        request(str(number), length, data.draw(st.integers(1, 6)), data.draw(st.sampled_from([None, "x", "y"])))
        for number, length in enumerate(lengths)
    ]
    core, executor = engine(depth=depth, staging_polls=staging_polls, fail_steps={lost_at: LOST})
    for one in requests:
        core.add(one)
    tokens, ends = drain(core)
    assert tokens == {one.request_id: expected(one) for one in requests}
    assert ends == {one.request_id: ("length", None) for one in requests}
    was_lost = any(len(plans) > lost_at for plans in (*executor.plans_before_restarts, executor.plans[: lost_at + 1]))
    assert core.state().num_restarts == len(executor.plans_before_restarts) == was_lost
    assert (core.state().num_held_blocks, executor.staged_images, core.staged_bytes) == (0, (), 0)
    assert core.stats.num_steps == sum(map(len, (*executor.plans_before_restarts, executor.plans)))


def test_log_probabilities_of_a_prompt_are_told_once() -> None:
    def told(**script: Any) -> list[Any]:
        core, _ = engine(**script)
        asks = SamplingRow(logprobs=1, prompt_logprobs=1)
        core.add(EngineRequest("a", tuple(range(30)), (), asks, 3, frozenset()))
        entries: list[Any] = []
        while core.has_work:
            for output in core.step():
                entries += [*output.prompt_logprobs, *output.logprobs]
        assert core.state().num_restarts == len(script)
        return entries

    undisturbed = told()
    assert len(undisturbed) == 29 + 3
    assert told(fail_steps={2: LOST}) == undisturbed


@pytest.mark.parametrize("what", ["idle", "add", "abort", "staging"])
def test_a_loss_is_found_by_whatever_asks_first(what: str) -> None:
    core, executor = engine(staging_polls=3)
    waits = request("waits", 9, image="x")
    if what != "idle":
        core.add(waits)
    executor.lose(LOST)
    ended = []
    if what == "idle":
        core.check()
        core.add(waits)
    elif what == "add":
        core.add(request("late", 9, image="y"))
    elif what == "abort":
        ended = core.abort("waits")
    tokens, ends = drain(core)
    assert core.state().num_restarts == 1
    assert executor.staged_images == ()
    if what == "abort":
        assert [output.finish_reason for output in ended] == ["abort"]
        assert ends == {}
    else:
        assert tokens["waits"] == expected(waits)
        assert set(ends) == ({"waits", "late"} if what == "add" else {"waits"})


class Fragile(FakeExecutor):
    """Loses its ranks when a prompt of thirteen tokens begins, or when the image "bad" comes."""

    def submit(self, plan: StepPlan) -> None:
        super().submit(plan)
        if any(len(new.token_ids) == 13 for new in plan.new):
            self.lose(LOST)

    def stage(self, key: str, kind: Any, array: Any) -> None:
        super().stage(key, kind, array)
        if key == "bad":
            self.lose(LOST)


@pytest.mark.parametrize("image", [None, "bad"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_request_that_loses_the_ranks_whenever_it_comes_ends_alone(image: str | None, depth: int) -> None:
    core, executor = engine(depth=depth, kind=Fragile, staging_polls=1)
    others = [request(name, 6, 5, image="x" if name == "b" else None) for name in "abc"]
    for one in (others[0], request("suspect", 12 if image else 13, 4, image=image), *others[1:]):
        core.add(one)
    tokens, ends = drain(core)
    assert ends == {
        "suspect": ("error", "ranks were lost 2 times while it was computed"),
        **{one.request_id: ("length", None) for one in others},
    }
    assert [tokens[one.request_id] for one in others] == [expected(one) for one in others]
    assert (core.state().num_restarts, executor.staged_images) == (2, ())


@pytest.mark.parametrize("aborts", [False, True])
def test_those_that_were_in_work_come_before_those_that_waited_and_newcomers(aborts: bool) -> None:
    core, executor = engine()
    for name in "abcdefgh":  # three have a slot
        core.add(request(name, 4, 6))
    core.step()
    core.step()
    executor.lose(LOST)
    core.check()
    core.add(request("i", 4, 6))
    if aborts:
        assert [core.abort(name)[0].finish_reason for name in "bdi"] == ["abort"] * 3
    assert core.state().num_staging == 9 - 1 - 3 * aborts, "one is tried, and nobody else is given"
    ended = []
    while core.has_work:
        ended += [output.request_id for output in core.step() if output.finish_reason]
    assert ended == (list("acefgh") if aborts else list("abcdefghi"))


def test_a_request_that_gets_tokens_between_losses_is_not_suspected() -> None:
    core, executor = engine()
    one = request("a", 8, 20)
    core.add(one)
    tokens: list[int] = []
    while core.has_work:
        outputs = core.step()
        tokens += [token for output in outputs for token in output.new_token_ids]
        if outputs and len(tokens) % 4 == 0 and not outputs[-1].finish_reason:
            executor.lose(LOST)
    assert tokens == expected(one)
    assert core.state().num_restarts == 4


def test_the_error_ends_the_engine_where_there_were_too_many_losses() -> None:
    core, executor = engine(max_restarts=1, fail_steps={1: LOST})
    core.add(request("a", 12, 9))
    core.step()
    core.step()
    assert core.state().num_restarts == 1
    executor.lose(LOST)
    with pytest.raises(ExecutorError, match=r"rank 1.*the process ended"):
        drain(core)


def test_the_failed_start_ends_the_engine() -> None:
    core, executor = engine(restarts=1)
    executor.lose(LOST)
    core.check()
    executor.lose(LOST)
    told = r"\(rank 1\): the process ended; and .* again: load .*no rank is left"
    with pytest.raises(ExecutorError, match=told) as caught:
        core.check()
    assert (caught.value.stage, caught.value.rank) == ("step", 1)


def test_ranks_are_not_started_again_where_the_engine_is_shut_down(caplog: pytest.LogCaptureFixture) -> None:
    core, executor = engine()
    executor.lose(LOST)
    core.shutdown()
    executor._state = "started"  # as where the shutdown of another thread is not yet through
    with pytest.raises(ExecutorError, match="the process ended"):
        core.check()
    assert (core.state().num_restarts, caplog.text) == (0, "")


def test_an_hour_later_there_may_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("dist_vlm.engine.restart_budget.time.monotonic", lambda: now)
    core, executor = engine(max_restarts=1)
    for later in (0.0, 3600.0, 3600.0):
        now += later
        executor.lose(LOST)
        core.check()
    executor.lose(LOST)
    now += 3599.0
    with pytest.raises(ExecutorError, match="the process ended"):
        core.check()
