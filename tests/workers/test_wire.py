"""What goes over the wire comes back equal, and nothing else is read."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_vlm.workers.config import LoadReport, RankConfig
from dist_vlm.workers.plan import (
    ImageFailure,
    ImageSpan,
    NewSequence,
    PromptLogprobs,
    SampledTokens,
    SamplingRow,
    Slice,
    SlotFailure,
    StepCounters,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from dist_vlm.workers.wire import WireError, decode, encode

ints = st.integers(0, 2**40)
keys = st.text(max_size=20)
many_ints = st.lists(ints, max_size=5).map(tuple)
sampling = st.builds(SamplingRow, st.floats(0, 2), ints, st.floats(0, 1), ints, ints)
spans = st.lists(st.builds(ImageSpan, keys, ints, ints), max_size=3).map(tuple)
plans = st.builds(
    StepPlan,
    ints,
    st.lists(st.builds(NewSequence, ints, many_ints, ints, spans, sampling), max_size=3).map(tuple),
    st.lists(st.builds(Slice, ints, ints, ints, many_ints, st.booleans()), max_size=3).map(tuple),
    many_ints,
    st.lists(keys, max_size=3).map(tuple),
    st.lists(keys, max_size=3).map(tuple),
    st.lists(st.tuples(ints, ints), max_size=3).map(tuple),
)
floats = st.floats(allow_nan=False)
logprobs = st.lists(
    st.builds(TokenLogprobs, floats, ints, many_ints, st.lists(floats, max_size=3).map(tuple)), max_size=3
).map(tuple)
results = st.builds(
    StepResult,
    ints,
    ints,
    st.lists(st.builds(SampledTokens, ints, many_ints, logprobs), max_size=3).map(tuple),
    st.lists(st.builds(PromptLogprobs, ints, ints, logprobs), max_size=3).map(tuple),
    st.lists(st.builds(ImageFailure, keys, keys), max_size=3).map(tuple),
    st.lists(st.builds(SlotFailure, ints, keys), max_size=3).map(tuple),
    st.builds(StepCounters, ints, ints, ints),
)


@given(plans)
def test_plans_come_back_equal(plan: StepPlan) -> None:
    assert decode(StepPlan, encode(plan)) == plan


@given(results)
def test_results_come_back_equal(result: StepResult) -> None:
    assert decode(StepResult, encode(result)) == result


@pytest.mark.parametrize("kv_cache_bytes", [None, 1 << 40])
def test_configs_and_reports_come_back_equal(kv_cache_bytes: int | None) -> None:
    config = RankConfig(
        "/m",
        "float32",
        "cpu",
        "dummy",
        1,
        2,
        16,
        64,
        4,
        32,
        0.9,
        kv_cache_bytes,
        1,
        "reference",
        False,
        "fused",
        "{}",
        None,
        0,
        256,
        True,
    )
    assert decode(RankConfig, encode(config)) == config
    report = LoadReport(0, 1, 2, 3, 4, 5, 6, {"norm": "reference"}, 7)
    assert decode(LoadReport, encode(report)) == report


def test_a_long_prompt_takes_few_bytes() -> None:
    tokens = tuple(range(100_000))
    plan = StepPlan(0, new=(NewSequence(0, tokens, 100_000, (), SamplingRow()),))
    assert len(encode(plan)) < 500_000


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        msgpack.packb(5),
        msgpack.packb([0]),
        msgpack.packb([0, [], [], [], [], [], [], []]),
        msgpack.packb(["0", [], [], [], [], [], []]),
        msgpack.packb([True, [], [], [], [], [], []]),
        msgpack.packb([0, [], [], [1.5], [], [], []]),
        msgpack.packb([0, [], [], [], [1], [], []]),
        msgpack.packb([0, [], [], [], [], [], [[1, 2, 3]]]),
        msgpack.packb([0, [], [[0, 0, 1, [], 1]], [], [], [], []]),
        msgpack.packb([0, [], [[0, 0, 1, [], True], [0, 0, 1, [], 1]], [], [], [], []]),
        msgpack.packb([0, [], [[0, 0, 1, [], True], [0, True, 1, [], True]], [], [], [], []]),
        msgpack.packb([0, [], [[0, 0, 1, [], True], [0, 0, 1, [], True, 0]], [], [], [], []]),
        msgpack.packb([0, [], [[0, 0, 1, [], True], [0, 0, 1, []]], [], [], [], []]),
        msgpack.packb([0, [], [[0, 0, 1, [], True], "abcde"], [], [], [], []]),
        msgpack.packb([0, [], [[0, 0, 1, [1], True], [0, 0, 1, [None], True]], [], [], [], []]),
        msgpack.packb([0, [], [[0, 0, 1, [], True], [0, 0, 1, "", True]], [], [], [], []]),
        msgpack.packb([0, [], {"a": 1}, [], [], [], []]),
        msgpack.packb({"step_id": 0}),
        msgpack.packb([0, [], [], [], [], [], []]) + b"\x00",
        msgpack.packb(msgpack.ExtType(5, b"x")),
    ],
)
def test_anything_else_is_refused(raw: bytes) -> None:
    with pytest.raises(WireError):
        decode(StepPlan, raw)


@pytest.mark.parametrize("entry", [None, [0.5, 1, [], [None]], [0.5, 1, []], [0.5, 1.0, [], []]])
def test_one_wrong_entry_behind_right_ones_is_refused(entry: object) -> None:
    right = [0.5, 1, [3], [0.25]]
    sampled = [[0, [5], []], [1, [6], [right]]]
    raw = [0, 0, [*sampled, [2, [7], [right, entry]]], [], [], [], [0, 0, 0]]
    with pytest.raises(WireError, match="SampledTokens"):
        decode(StepResult, msgpack.packb(raw))
    raw[2] = [*sampled, [2, [7], [right]]]
    assert decode(StepResult, msgpack.packb(raw)).sampled[2].logprobs == (TokenLogprobs(0.5, 1, (3,), (0.25,)),)


def test_what_is_no_dataclass_is_not_written() -> None:
    with pytest.raises(TypeError, match="no writer for set"):
        encode(StepPlan(0, release={1}))  # type: ignore[arg-type]
