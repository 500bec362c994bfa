"""Cached beginnings. The rig's ledger checks that a cached block holds what its new sequence begins with."""

import pytest

from dist_vlm.sched.block_hash import BlockHasher
from dist_vlm.sched.request import Request
from dist_vlm.workers.plan import ImageSpan, SamplingRow

from .driving import Rig, expected_tokens

PROMPT = tuple(range(100, 118))


def rig(**changes):
    return Rig(**({"prefix_caching": True, "budget": 64, "block_size": 4} | changes))


def run_one(rig, name, prompt=PROMPT, **fields):
    one = Request(name, prompt, **({"max_tokens": 3} | fields))
    rig.add(one)
    rig.run()
    return one


def computed(rig):
    return sum(plan.num_tokens for plan in rig.plans)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_second_request_computes_only_what_the_first_did_not(depth):
    one = rig(depth=depth)
    first = run_one(one, "first")
    before = computed(one)
    second = run_one(one, "second")
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 16)
    assert computed(one) - before == 2 + 2, "two prompt tokens, and two of the three sampled ones"
    assert one.tokens["first"] == one.tokens["second"] == expected_tokens(PROMPT, 3)
    stats = one.scheduler.stats
    assert (stats.num_queried_tokens, stats.num_hit_tokens) == (36, 16)


def test_what_is_done_before_a_request_is_added_need_not_be_done_again(monkeypatch):
    one = rig()
    run_one(one, "first")
    second = Request("second", PROMPT, max_tokens=1)
    one.scheduler.look_ahead(second)
    known = list(second.block_digests)
    assert len(known) == 4, "18 tokens: of all full blocks"
    monkeypatch.setattr(BlockHasher, "extend", lambda *_, **__: pytest.fail("they are known"))
    one.add(second)
    one.run()
    assert (second.num_cached_tokens, second.block_digests) == (16, known)


def test_nothing_is_done_ahead_where_nothing_is_shared():
    one = rig(prefix_caching=False)
    request = Request("one", PROMPT, max_tokens=1)
    one.scheduler.look_ahead(request)
    assert request.block_digests == []


def test_a_request_that_starts_over_elsewhere_shares_with_those_that_are_there():
    """The other cache has another key."""
    one, other = rig(), rig()
    moved = Request("moved", PROMPT, max_tokens=1)
    one.scheduler.look_ahead(moved)
    moved.start_over()
    run_one(other, "first")
    other.add(moved)
    other.run()
    assert moved.num_cached_tokens == 16


def test_at_least_one_token_is_computed():
    one = rig()
    run_one(one, "first", PROMPT[:16])
    assert run_one(one, "second", PROMPT[:16]).num_cached_tokens == 12


def test_an_answer_is_found_by_the_next_turn_of_its_conversation():
    one = rig()
    run_one(one, "first", max_tokens=7)
    follow_up = (*PROMPT, *one.tokens["first"], 1, 2, 3)
    # 18 prompt tokens and 6 computed tokens of the answer: six full blocks.
    assert run_one(one, "second", follow_up).num_cached_tokens == 24


def test_the_same_text_with_another_picture_never_shares_a_block():
    one = rig()
    for name in "xy":
        run_one(one, name, images=(ImageSpan(name, 0, 8),))
    assert one.scheduler.stats.num_hit_tokens == 0
    assert run_one(one, "again", images=(ImageSpan("x", 0, 8),)).num_cached_tokens == 16
    assert [plan.encode for plan in one.plans if plan.encode] == [("x",), ("y",)], "cached rows need no features"


def test_other_salts_never_share_a_block():
    one = rig()
    run_one(one, "a", cache_salt="a")
    assert run_one(one, "b", cache_salt="b").num_cached_tokens == 0
    assert run_one(one, "a2", cache_salt="a").num_cached_tokens == 16


def test_prompt_logprobs_are_computed_whatever_is_cached():
    one = rig()
    run_one(one, "first")
    asking = run_one(one, "second", sampling=SamplingRow(prompt_logprobs=0))
    assert asking.num_cached_tokens == 0


def test_off_means_off():
    one = rig(prefix_caching=False)
    for name in "ab":
        assert run_one(one, name).num_cached_tokens == 0
    assert one.scheduler.pool.num_cached == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_requests_that_come_together_wait_for_the_one_that_computes_their_beginning(depth):
    one = rig(depth=depth)
    for name in "abcd":
        one.add(Request(name, PROMPT, max_tokens=3))
    one.run()
    # The first computes 18 tokens, the others 2 each, and all of them two sampled ones.
    assert computed(one) == 18 + 3 * 2 + 4 * 2
    assert len({tuple(tokens) for tokens in one.tokens.values()}) == 1


def test_a_short_common_beginning_is_not_waited_for():
    one = rig()
    for name in "ab":
        one.add(Request(name, (*PROMPT[:4], *(ord(name) + i for i in range(12))), max_tokens=1))
    one.step()
    assert len(one.plans[0].new) == 2


def test_a_request_does_not_wait_for_one_that_failed():
    one = rig(fail_images=frozenset({"bad"}))
    image = (ImageSpan("bad", 0, 8),)
    for name in "ab":
        one.add(Request(name, PROMPT, max_tokens=3, images=image))
    one.run()
    assert one.ends == {"a": ["error"], "b": ["error"]}
    assert one.scheduler.pool.num_cached == 0, "nothing of a failed request is offered to others"


def test_what_was_used_longest_ago_is_evicted_and_the_end_of_a_sequence_before_its_beginning():
    one = rig(num_blocks=8)
    run_one(one, "a", PROMPT[:12], max_tokens=1)
    run_one(one, "b", tuple(range(200, 220)), max_tokens=1)
    assert one.scheduler.pool.num_cached == 3 + 5
    run_one(one, "c", tuple(range(300, 304)), max_tokens=1)
    assert one.scheduler.pool.num_evictions == 1
    assert run_one(one, "a2", PROMPT[:12], max_tokens=1).num_cached_tokens == 8


def test_a_preempted_request_finds_what_it_had_computed():
    one = rig(num_blocks=7, budget=64)
    one.add(Request("old", PROMPT[:10], max_tokens=14))
    one.add(Request("young", tuple(range(200, 206)), max_tokens=8))
    one.run()
    assert one.scheduler.stats.num_preemptions > 0
    assert one.scheduler.stats.num_hit_tokens > 0
    for name, prompt, count in (("old", PROMPT[:10], 14), ("young", tuple(range(200, 206)), 8)):
        assert one.tokens[name] == expected_tokens(prompt, count)
