import dataclasses
import time

import numpy as np
import pytest

from dist_vlm.engine.core import EngineCore
from dist_vlm.engine.messages import EngineImage, EngineRequest
from dist_vlm.engine.state import EngineState
from dist_vlm.executor.base import ExecutorError
from dist_vlm.executor.fake import FakeExecutor, checksum_token
from dist_vlm.sched.scheduler import SchedulerStats
from dist_vlm.workers.plan import ImageSpan, SamplingRow


def request(name, length=5, max_tokens=4, image=None):
    prompt = tuple((sum(name.encode()) + i) % 1000 for i in range(length))
    array = np.zeros((1, 3, 2, 2), np.float32)
    images = () if image is None else (EngineImage(ImageSpan(image, 1, 3), "pixel_values", array),)
    return EngineRequest(name, prompt, images, SamplingRow(), max_tokens, frozenset())


def engine(depth=1, feature_rows=None, **script):
    executor = FakeExecutor(num_blocks=16, block_size=4, max_num_seqs=3, max_num_batched_tokens=8, **script)
    core = EngineCore(
        executor,
        block_size=4,
        max_model_len=64,
        max_num_seqs=3,
        max_num_batched_tokens=8,
        depth=depth,
        feature_rows=feature_rows,
    )
    core.start()
    return core, executor


def drain(core, outputs=None):
    tokens, ends = {}, {}
    while core.has_work:
        for output in core.step():
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
            if output.finish_reason:
                assert output.request_id not in ends, "ended twice"
                ends[output.request_id] = (output.finish_reason, output.stop_reason)
    return tokens, ends


def expected(one):
    tokens = list(one.prompt_token_ids)
    for _ in range(one.max_tokens):
        tokens.append(checksum_token(tokens, len(tokens)))
    return tokens[len(one.prompt_token_ids) :]


@pytest.mark.parametrize("num_told", [1, 3])
def test_a_request_that_another_engine_began_goes_on_behind_what_it_told(num_told):
    one = request("a", 9, image="x")
    told = tuple(expected(one)[:num_told])
    core, _ = engine()
    core.add(dataclasses.replace(one, output_token_ids=told))
    tokens, ends = drain(core)
    assert [*told, *tokens["a"]] == expected(one)
    assert ends == {"a": ("length", None)}


def test_a_request_of_which_all_is_told_is_refused():
    core, _ = engine()
    with pytest.raises(ValueError, match="4 tokens are answered; max_tokens is 4"):
        core.add(dataclasses.replace(request("a"), output_token_ids=(1, 2, 3, 4)))


def test_while_images_are_on_their_way_what_can_be_done_is_done_and_then_the_executor_waits(monkeypatch):
    waits = []
    core, executor = engine(staging_polls=2)
    monkeypatch.setattr(executor, "wait_staged", waits.append)
    core.add(request("a", 9, image="x"))
    assert len(core._held["a"].record.block_digests) == 2
    assert core.step() == []
    assert len(waits) == 1 and 0 < waits[0] < 0.01
    tokens, _ = drain(core)
    assert tokens["a"] == expected(request("a", 9))
    core.add(request("b", 9))
    told = len(waits)
    drain(core)
    assert len(waits) == told, "there is nothing to wait for"


@pytest.mark.parametrize("depth", [1, 2])
def test_requests_with_and_without_images_run_to_their_end(depth):
    core, executor = engine(depth, staging_polls=2)
    requests = [request("a"), request("b", 9, image="x"), request("c", 20), request("d", 6, image="x")]
    for one in requests:
        core.add(one)
    tokens, ends = drain(core)
    assert tokens == {one.request_id: expected(one) for one in requests}
    assert set(ends.values()) == {("length", None)}
    assert len(ends) == 4
    assert executor.staged_images == (), "images leave the ranks with their last request"


def test_a_failed_image_and_a_failed_staging_fail_alone():
    core, _ = engine(fail_images={"x": "the image could not be encoded"}, fail_stage={"y": "no room"})
    for one in (request("bad", 9, image="x"), request("worse", 9, image="y"), request("good", 9, image="z")):
        core.add(one)
    tokens, ends = drain(core)
    assert ends == {
        "bad": ("error", "the image could not be encoded"),
        "worse": ("error", "an image could not be staged"),
        "good": ("length", None),
    }
    assert tokens["good"] == expected(request("good", 9, image="z"))


def test_abort_while_images_are_on_their_way_and_while_running():
    core, executor = engine(staging_polls=50)
    core.add(request("waits", 9, image="x"))
    core.add(request("runs", 5, max_tokens=30))
    for _ in range(3):
        core.step()
    assert [output.finish_reason for output in core.abort("waits")] == ["abort"]
    assert [output.finish_reason for output in core.abort("runs")] == ["abort"]
    assert core.abort("runs") == []
    drain(core)
    core.add(request("next"))
    drain(core)
    assert executor.staged_images == ()


def test_a_lost_rank_is_an_executor_error():
    lost = ExecutorError("step", "the process ended", 1)
    core, _ = engine(fail_steps={2: lost})
    core.add(request("a"))
    with pytest.raises(ExecutorError, match=r"rank 1.*the process ended"):
        drain(core)


def test_a_sequence_longer_than_the_cache_is_refused_at_the_start():
    executor = FakeExecutor(num_blocks=3, block_size=4)
    core = EngineCore(executor, block_size=4, max_model_len=13, max_num_seqs=3, max_num_batched_tokens=8)
    with pytest.raises(ValueError, match=r"holds 12 tokens .*max_model_len = 13.*to at most 12"):
        core.start()


def test_a_request_id_in_use_is_refused():
    core, _ = engine()
    core.add(request("a"))
    with pytest.raises(ValueError, match="in use"):
        core.add(request("a"))


def test_an_image_is_unstaged_though_its_request_never_ran():
    core, executor = engine(staging_polls=9)
    core.add(request("a", 9, image="x"))
    core.step()
    assert executor.staged_images == ("x",)
    (ended,) = core.abort("a")
    assert (ended.finish_reason, core.has_work) == ("abort", False)
    assert executor.staged_images == ()
    assert core.staged_bytes == 0


def test_a_request_whose_image_never_arrives_fails_alone_in_time():
    executor = FakeExecutor(num_blocks=16, block_size=4, staging_polls=10**9)
    core = EngineCore(
        executor, block_size=4, max_model_len=64, max_num_seqs=3, max_num_batched_tokens=8, staging_timeout_s=0.05
    )
    core.start()
    core.add(request("stuck", 9, image="x"))
    core.add(request("good"))
    tokens, ends = drain(core)
    assert ends == {"stuck": ("error", "an image could not be staged"), "good": ("length", None)}
    assert tokens["good"] == expected(request("good"))
    assert executor.staged_images == ()


def test_the_state_is_what_a_scripted_run_adds_up_to():
    core, _ = engine(feature_rows=12, staging_polls=1)
    empty = EngineState(SchedulerStats(), 0, 0, 0, 16, 0, 0, 0, 12, 0, 0, 0)
    assert core.state() == empty
    for name in "abcd":
        core.add(request(name))
    core.add(request("e", 9, image="x"))
    assert core.state() == EngineState(
        SchedulerStats(), num_running=0, num_waiting=4, num_staging=1, num_blocks=16, num_held_blocks=0,
        num_cached_blocks=0, num_feature_rows=0, feature_row_capacity=12, num_staged_images=1, staged_bytes=48,
        num_restarts=0,
    )  # fmt: skip
    core.step()
    # A budget of eight tokens: a's prompt of five, in two blocks, and three of b's, in one. Two have a slot.
    state = core.state()
    assert (state.num_running, state.num_waiting, state.num_staging, state.num_held_blocks) == (2, 2, 1, 3)
    assert (state.stats.num_steps, state.stats.num_scheduled_tokens) == (1, 8)
    assert state.stats is not core.stats, "a copy: the core goes on counting"
    core.step()  # the image has arrived
    assert core.state().num_staging == 0
    drain(core)
    # Every prompt and all of the answers but their last tokens: 4 x (5 + 3) + 9 + 3 positions in blocks of four, whose
    # full ones are kept. The image's three rows are kept too, but not the image.
    state = core.state()
    assert state.stats.num_scheduled_tokens == 4 * 8 + 12
    assert (state.stats.num_queried_images, state.stats.num_hit_images, state.stats.num_encoded_images) == (1, 0, 1)
    assert state == EngineState(
        state.stats, num_running=0, num_waiting=0, num_staging=0, num_blocks=16, num_held_blocks=0,
        num_cached_blocks=4 * 2 + 3, num_feature_rows=3, feature_row_capacity=12, num_staged_images=0, staged_bytes=0,
        num_restarts=0,
    )  # fmt: skip


def test_silence_is_counted_from_when_a_rank_was_heard():
    core, executor = engine(num_ranks=3)
    executor.silent_since = {1: time.monotonic() - 7.0, 2: time.monotonic() + 60.0}
    first, second, third = core.silence()
    assert 0.0 <= first < 1.0
    assert 7.0 <= second < 8.0
    assert third == 0.0


def test_ranks_lost_while_there_is_no_work_are_found_by_a_check():
    core, executor = engine()
    core.check()
    executor.lose(ExecutorError("step", "its process died", 1))
    with pytest.raises(ExecutorError, match="rank 1"):
        core.check()
