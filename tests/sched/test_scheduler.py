import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_vlm.sched.block_pool import BlockPool, BooksError
from dist_vlm.sched.request import Request
from dist_vlm.sched.scheduler import Scheduler
from dist_vlm.workers.plan import ImageSpan, SampledTokens, StepResult

from .driving import Rig, expected_tokens, prompt_with_images


def request(name, length, max_tokens=4, images=(), stop=frozenset()):
    prompt = prompt_with_images(sum(name.encode()), length, images)
    return Request(name, prompt, max_tokens=max_tokens, images=images, stop_token_ids=stop)


def test_prefill_is_cut_to_the_token_budget_and_decode_rides_along():
    rig = Rig(budget=6)
    rig.add(request("a", 4))
    rig.add(request("b", 9))
    rig.run()
    sizes = [[piece.count for piece in plan.slices] for plan in rig.plans]
    assert sizes[:3] == [[4, 2], [1, 5], [1, 2]]
    assert all(plan.num_tokens <= 6 for plan in rig.plans)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tokens_do_not_depend_on_cutting_or_depth(depth):
    rig = Rig(budget=5, depth=depth)
    requests = [request(name, length) for name, length in [("a", 3), ("b", 17), ("c", 1)]]
    for one in requests:
        rig.add(one)
    rig.run()
    for one in requests:
        assert rig.tokens[one.request_id] == expected_tokens(one.prompt_token_ids, 4)
        assert rig.ends[one.request_id] == ["length"]


def test_a_stop_token_ends_a_request_and_is_its_last():
    probe = request("a", 5, max_tokens=9)
    stop = expected_tokens(probe.prompt_token_ids, 9)[3]
    for depth in (1, 2):
        rig = Rig(depth=depth)
        one = request("a", 5, max_tokens=9, stop=frozenset({stop}))
        rig.add(one)
        rig.run()
        assert rig.tokens["a"] == expected_tokens(one.prompt_token_ids, 9, frozenset({stop}))
        assert (one.finish_reason, one.stop_reason) == ("stop", stop)
        assert rig.scheduler.pool.num_held == 0


def test_blocks_running_out_preempts_the_youngest_which_starts_over_and_ends_the_same():
    rig = Rig(num_blocks=6, block_size=4, budget=64)
    rig.add(request("old", 10, max_tokens=10))
    rig.add(request("young", 6, max_tokens=8))
    rig.run()
    assert rig.scheduler.stats.num_preemptions > 0
    assert rig.tokens["old"] == expected_tokens(request("old", 10).prompt_token_ids, 10)
    assert rig.tokens["young"] == expected_tokens(request("young", 6).prompt_token_ids, 8)
    told = [new for plan in rig.plans for new in plan.new]
    again = [new for new in told if new.num_prompt_tokens == 6 and len(new.token_ids) > 6]
    assert again, "a preempted request is told again with the tokens it had"


def test_slots_run_out_before_blocks():
    rig = Rig(max_num_seqs=2)
    for name in "abc":
        rig.add(request(name, 3))
    rig.step()
    assert (rig.scheduler.num_running, rig.scheduler.num_waiting) == (2, 1)
    rig.run()
    assert all(ends == ["length"] for ends in rig.ends.values())


def test_an_image_is_encoded_when_first_needed_and_dropped_when_passed():
    rig = Rig(budget=4)
    rig.add(request("a", 12, max_tokens=3, images=(ImageSpan("x", 5, 5),)))
    rig.run()
    encoded = [plan.step_id for plan in rig.plans if plan.encode]
    dropped = [plan.step_id for plan in rig.plans if plan.drop_features]
    # Tokens 0-3, 4-7 (the image begins), 8-11 (it ends), then decode.
    assert (encoded, dropped) == ([1], [3])
    assert rig.scheduler.stats.num_image_cuts == 1


def test_two_requests_share_an_image():
    rig = Rig(budget=64)
    for name in "ab":
        rig.add(request(name, 9, images=(ImageSpan("x", 2, 5),)))
    rig.run()
    assert [plan.encode for plan in rig.plans if plan.encode] == [("x",)]


def test_the_encoder_takes_one_budget_of_rows_a_step():
    rig = Rig(budget=12, block_size=8)
    images = (ImageSpan("x", 0, 5), ImageSpan("y", 5, 5), ImageSpan("z", 10, 20))
    rig.add(request("a", 32, images=images))
    rig.run()
    assert [plan.encode for plan in rig.plans if plan.encode] == [("x", "y"), ("z",)]
    assert rig.plans[0].num_tokens == 10, "cut before the image that is too many"


def test_an_image_larger_than_the_budget_is_encoded_alone():
    rig = Rig(budget=4)
    rig.add(request("a", 20, images=(ImageSpan("x", 1, 15),)))
    rig.run()
    assert [plan.encode for plan in rig.plans if plan.encode] == [("x",)]
    assert rig.scheduler.stats.num_image_cuts >= 3


def test_a_failed_image_fails_its_requests_alone():
    rig = Rig(budget=64, fail_images=frozenset({"x"}))
    rig.add(request("bad", 9, images=(ImageSpan("x", 2, 5),)))
    rig.add(request("good", 9, images=(ImageSpan("y", 2, 5),)))
    rig.run()
    assert rig.ends == {"bad": ["error"], "good": ["length"]}
    good = request("good", 9, images=(ImageSpan("y", 2, 5),))
    assert rig.tokens["good"] == expected_tokens(good.prompt_token_ids, 4)


@pytest.mark.parametrize("steps_before", [0, 1, 2, 4])
@pytest.mark.parametrize("depth", [1, 2])
def test_abort_at_any_moment_frees_everything(steps_before, depth):
    rig = Rig(budget=4, depth=depth)
    rig.add(request("a", 9, max_tokens=20, images=(ImageSpan("x", 2, 5),)))
    rig.add(request("b", 5))
    for _ in range(steps_before):
        rig.step()
    rig.note(rig.scheduler.abort("a"))
    rig.run()
    assert rig.ends["a"] == ["abort"]
    assert rig.ends["b"] == ["length"]
    assert rig.scheduler.pool.num_held == 0
    assert rig.scheduler.abort("a") is None


def test_blocks_named_by_a_plan_in_flight_are_held_until_it_is_committed():
    rig = Rig(depth=2)
    rig.add(request("a", 4, max_tokens=9))
    plan = rig.scheduler.plan()
    rig.scheduler.abort("a")
    assert rig.scheduler.pool.num_held == 1
    rig.scheduler.commit(rig.ledger.apply(plan))
    assert rig.scheduler.pool.num_held == 0


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (Request("a", (), max_tokens=1), "no tokens"),
        (Request("a", (1,), max_tokens=0), "max_tokens = 0"),
        (Request("a", (1,) * 200, max_tokens=57), "257 tokens; the KV cache holds 256"),
    ],
)
def test_a_request_that_could_never_run_is_refused(one, message):
    with pytest.raises(ValueError, match=message):
        Rig().scheduler.add(one)


def test_a_request_id_in_use_is_refused():
    rig = Rig()
    rig.add(request("a", 3))
    with pytest.raises(ValueError, match="in use"):
        rig.scheduler.add(request("a", 3))


def test_a_result_of_another_step_is_refused():
    rig = Rig()
    rig.add(request("a", 3))
    rig.scheduler.plan()
    with pytest.raises(BooksError, match="step 5 while step 0"):
        rig.scheduler.commit(StepResult(step_id=5, rank=0))


def test_several_tokens_in_a_result_are_taken_up_to_the_one_that_ends_it():
    scheduler = Scheduler(pool=BlockPool(8, 4), max_num_seqs=1, max_num_batched_tokens=8)
    scheduler.add(Request("a", (1, 2), max_tokens=9, stop_token_ids=frozenset({7})))
    scheduler.plan()
    (update,) = scheduler.commit(StepResult(0, 0, sampled=(SampledTokens(0, (5, 7, 6)),)))
    assert update.new_token_ids == (5, 7)
    assert update.request.finish_reason == "stop"
    scheduler.check()


IMAGES = st.lists(st.integers(0, 5), max_size=2, unique=True)
ARRIVALS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 12), IMAGES, st.integers(0, 12), st.booleans()),
    min_size=1,
    max_size=12,
)


def spans_of(images, length):
    """Spans of an image's own size, one after another with a gap, as many as fit; the image sets the size."""
    spans, start = [], 1
    for image in images:
        size = 2 + 2 * image
        if start + size <= length:
            spans.append(ImageSpan(f"image{image}", start, size))
            start += size + 1
    return tuple(spans)


@settings(max_examples=150, deadline=None)
@given(
    arrivals=ARRIVALS,
    budget=st.integers(1, 24),
    num_blocks=st.integers(14, 30),
    max_num_seqs=st.integers(1, 5),
    depth=st.integers(1, 3),
    failing=st.frozensets(st.sampled_from(["image0", "image3"]), max_size=2),
)
def test_random_traffic_keeps_the_books_and_ends_each_request_once(
    arrivals, budget, num_blocks, max_num_seqs, depth, failing
):
    """Arrivals, aborts, preemptions and failing images; the rig proves the books after every step."""
    rig = Rig(
        num_blocks=num_blocks,
        block_size=4,
        max_num_seqs=max_num_seqs,
        budget=budget,
        depth=depth,
        fail_images=failing,
    )
    requests = {}
    for index, (length, max_tokens, images, pause, abort) in enumerate(arrivals):
        name = f"r{index}"
        one = request(name, length, max_tokens, spans_of(images, length))
        requests[name] = one
        rig.add(one)
        for _ in range(pause):
            rig.step()
        if abort:
            rig.note(rig.scheduler.abort(name))
    rig.run()
    for name, one in requests.items():
        assert len(rig.ends[name]) == 1
        whole = expected_tokens(one.prompt_token_ids, one.max_tokens)
        reason = rig.ends[name][0]
        if reason == "length":
            assert rig.tokens[name] == whole
        else:
            assert rig.tokens[name] == whole[: len(rig.tokens[name])]
        assert reason != "error" or any(span.image in failing for span in one.images)
    assert rig.scheduler.pool.num_free == num_blocks
