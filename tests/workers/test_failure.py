"""A rank's failure is one line, and survives the way to the driver."""

from __future__ import annotations

import pickle

from dist_vlm.workers.failure import MAX_CAUSE_CHARS, RankError, describe


def test_a_description_is_one_line_of_bounded_length() -> None:
    assert describe(ValueError("a\n   b\tc")) == "ValueError: a b c"
    assert describe(KeyError()) == "KeyError"
    long = describe(ValueError("x" * 10_000))
    assert len(long) == MAX_CAUSE_CHARS
    assert long.endswith("...")


def test_a_rank_error_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(RankError(3, "load", "no weights")))
    assert (copy.rank, copy.stage, copy.cause) == (3, "load", "no weights")
    assert str(copy) == "rank 3, load: no weights"
