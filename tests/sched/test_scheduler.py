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


@pytest.mark.parametrize("keep", [False, True])
def test_images_looked_up_and_found_are_counted_when_a_request_begins(keep):
    rig = Rig(budget=64, keep_features=keep, prefix_caching=True)
    shared, own = ImageSpan("x", 1, 4), ImageSpan("y", 8, 4)
    rig.add(request("a", 16, images=(shared, own)))
    rig.add(request("b", 16, images=(shared,)))  # while a encodes it
    rig.run()
    assert counts(rig) == (3, 1, 2)
    rig.add(request("c", 16, images=(shared, ImageSpan("x", 9, 4))))  # twice in one prompt: one image
    rig.run()
    assert counts(rig) == ((4, 2, 2) if keep else (4, 1, 3))
    rig.add(request("a", 16, images=(shared, own)))  # three blocks of four positions are cached: both are covered
    rig.run()
    assert counts(rig) == ((4, 2, 2) if keep else (4, 1, 3))


def counts(rig):
    stats = rig.scheduler.stats
    return stats.num_queried_images, stats.num_hit_images, stats.num_encoded_images


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


def test_a_long_prompt_leaves_a_token_to_each_answer_behind_it():
    rig = Rig(budget=8, num_blocks=64)
    rig.add(request("long", 40, max_tokens=2))
    rig.step()
    rig.add(request("short", 3, max_tokens=6))
    rig.step()
    rig.run()
    sizes = [sorted(piece.count for piece in plan.slices) for plan in rig.plans]
    assert sizes[1] == [8], "a waiting request takes what running ones leave"
    decoding = [size for size in sizes if len(size) == 2]
    assert all(size[0] <= 3 for size in decoding)
    assert rig.ends == {"long": ["length"], "short": ["length"]}


def test_higher_priority_runs_first_and_equal_ones_in_the_order_of_arrival():
    rig = Rig(max_num_seqs=1)
    order = []
    for name, priority in [("a", 0), ("low", 7), ("b", 0), ("urgent", -3)]:
        one = request(name, 3)
        one.priority = priority
        rig.add(one)
    while rig.scheduler.has_work:
        rig.step()
        order += [name for name, ends in rig.ends.items() if ends and name not in order]
    assert order == ["urgent", "a", "b", "low"]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("scarce", ["slots", "blocks"])
def test_a_request_of_higher_priority_takes_the_place_of_a_running_one(depth, scarce):
    rig = Rig(max_num_seqs=1, depth=depth) if scarce == "slots" else Rig(num_blocks=6, depth=depth)
    low = request("low", 9, max_tokens=10)
    low.priority = 1
    rig.add(low)
    for _ in range(3):
        rig.step()
    rig.add(request("high", 9, max_tokens=10))
    while not rig.ends["high"]:
        rig.step()
    assert not rig.ends["low"]
    rig.run()
    assert low.num_preemptions == 1
    for name in ("low", "high"):
        assert rig.tokens[name] == expected_tokens(request(name, 9).prompt_token_ids, 10)


def test_a_younger_request_of_equal_priority_waits():
    rig = Rig(max_num_seqs=1)
    rig.add(request("a", 3, max_tokens=9))
    rig.step()
    rig.add(request("b", 3))
    rig.run()
    assert rig.scheduler.stats.num_preemptions == 0


def test_nothing_to_schedule_fails_exactly_those_that_can_never_run_and_names_the_resource():
    rig = Rig(num_blocks=8, block_size=4, feature_rows=8)
    rig.add(request("fits", 6))
    rig.add(request("too long", 6))
    rig.add(request("big image", 12, images=(ImageSpan("x", 1, 8),)))
    rig.scheduler._requests["too long"].max_tokens = 99
    rig.scheduler.features.capacity_rows = 4
    updates = rig.scheduler.unblock()
    told = {update.request.request_id: update.request.stop_reason for update in updates}
    assert told == {
        "too long": "prompt and max_tokens are 105 tokens; the KV cache holds 32",
        "big image": "an image has 8 feature rows; the feature cache holds 4",
    }
    rig.run()
    assert rig.ends["fits"] == ["length"]


def test_a_defect_of_the_books_is_told_with_all_resources():
    rig = Rig()
    rig.add(request("a", 3))
    with pytest.raises(BooksError, match=r"1 requests wait, 0 run .* 4 free slots, 64 blocks .* 0 feature rows"):
        rig.scheduler.unblock()


def test_images_wait_for_room_among_the_features():
    rig = Rig(budget=64, feature_rows=8)
    images = tuple(ImageSpan(name, 8 * index, 8) for index, name in enumerate("xyz"))
    rig.add(request("a", 30, images=images))
    rig.run()
    assert [plan.encode for plan in rig.plans if plan.encode] == [("x",), ("y",), ("z",)]
    assert rig.ends["a"] == ["length"]


def test_the_same_picture_in_ten_requests_is_encoded_once():
    rig = Rig(budget=20, feature_rows=40, keep_features=True)
    for index in range(10):
        rig.add(request(f"r{index}", 12, images=(ImageSpan("x", 2, 8),)))
        rig.run()
    assert [plan.encode for plan in rig.plans if plan.encode] == [("x",)]
    assert all(ends == ["length"] for ends in rig.ends.values())


def test_a_failed_slot_fails_its_request_alone_and_publishes_nothing():
    rig = Rig(budget=64, depth=2, prefix_caching=True, fail_slots=frozenset({(0, 0)}))
    rig.add(request("bad", 9))
    rig.add(request("good", 9))
    rig.run()
    assert rig.ends == {"bad": ["error"], "good": ["length"]}
    again = request("bad2", 9)
    again.prompt_token_ids = request("bad", 9).prompt_token_ids
    rig.add(again)
    rig.run()
    assert again.num_cached_tokens == 0


IMAGES = st.lists(st.integers(0, 5), max_size=2, unique=True)
# length, max_tokens, images, steps before the next, whether to abort, family of the prompt, priority
ARRIVALS = st.lists(
    st.tuples(
        st.integers(1, 40), st.integers(1, 12), IMAGES, st.integers(0, 12), st.booleans(),
        st.integers(0, 2), st.integers(0, 2),
    ),
    min_size=1,
    max_size=12,
)  # fmt: skip


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
    failing_slots=st.frozensets(st.tuples(st.integers(0, 30), st.integers(0, 4)), max_size=3),
    prefix_caching=st.booleans(),
    feature_rows=st.sampled_from([None, 12, 20]),
    keep_features=st.booleans(),
)
def test_random_traffic_keeps_the_books_and_ends_each_request_once(
    arrivals, budget, num_blocks, max_num_seqs, depth, failing, failing_slots, prefix_caching, feature_rows,
    keep_features,
):  # fmt: skip
    """Arrivals, aborts, priorities, preemptions, scarce caches, shared beginnings, failing images and slots.

    The rig proves the books after every step, and its ledger every cached block's content."""
    rig = Rig(
        num_blocks=num_blocks,
        block_size=4,
        max_num_seqs=max_num_seqs,
        budget=budget,
        depth=depth,
        fail_images=failing,
        fail_slots=failing_slots,
        prefix_caching=prefix_caching,
        feature_rows=feature_rows,
        keep_features=keep_features,
    )
    requests = {}
    for index, (length, max_tokens, images, pause, abort, family, priority) in enumerate(arrivals):
        name, spans = f"r{index}", spans_of(images, length)
        one = Request(name, prompt_with_images(family, length, spans), max_tokens, images=spans, priority=priority)
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
        guilty = any(span.image in failing for span in one.images) or one.stop_reason == "bad slot"
        assert reason != "error" or guilty
    assert rig.scheduler.pool.num_allocatable == num_blocks


def test_a_block_that_is_held_while_there_is_nothing_to_do_is_found_by_the_sums_alone() -> None:
    scheduler = Rig().scheduler
    scheduler.check_sums()
    scheduler.pool.allocate(1)
    with pytest.raises(BooksError, match="idle with 1 blocks held"):
        scheduler.check_sums()
