from __future__ import annotations

import json
import random

import numpy as np
import pytest

from dist_vlm.launch.bench_figures import Figure, Report, percentile, rounded, spread_ms, table


def test_a_share_is_one_on_the_floor_and_less_where_it_is_slower() -> None:
    assert Figure("a", "a", 4.0, "ms", 3.0).share == 0.75
    assert Figure("a", "a", 30.0, "req/s", 40.0, is_rate=True).share == 0.75
    assert Figure("a", "a", 3.0, "ms", 3.0).share == 1
    assert Figure("a", "a", 3.0, "ms").share is None
    assert Figure("a", "a", -0.1, "ms", 3.0).share is None


def test_the_json_has_every_number_and_null_for_no_floor() -> None:
    figures = (Figure("a", "first", 1.23456789, "ms", 0.5), Figure("b", "second", 7.0, "s"))
    assert json.loads(json.dumps(Report(figures, {"more": [1]}).as_json())) == {
        "figures": {
            "a": {"value": 1.23457, "unit": "ms", "floor": 0.5, "share_of_floor": 0.405},
            "b": {"value": 7.0, "unit": "s", "floor": None, "share_of_floor": None},
        },
        "more": [1],
    }


def test_the_table_has_a_line_for_each_with_its_share() -> None:
    figures = [Figure("a", "step", 4.0, "ms", 3.0), Figure("b", "output tokens", 3765.2, "tok/s", is_rate=True)]
    assert table(figures).splitlines() == [
        "step                   4 ms   floor 3 ms, 75 % of it",
        "output tokens      3 765 tok/s",
    ]


@pytest.mark.parametrize("count", [1, 2, 7, 100, 101])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_a_percentile_is_numpys_inverted_cdf(count: int, share: float) -> None:
    values = [random.Random(count).random() for _ in range(count)]
    assert percentile(values, share) == np.percentile(values, 100 * share, method="inverted_cdf")


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 0.0), ([1.0], 1.1)])
def test_a_percentile_of_nothing_is_refused(values: list[float], share: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \(0, 1\], of at least one value"):
        percentile(values, share)


def test_numbers_are_rounded_to_significant_digits() -> None:
    assert rounded(123456.789) == 123457
    assert rounded(0.000123456789) == 0.000123457
    assert (rounded(0.0), rounded(None)) == (0.0, None)
    assert spread_ms([0.003, 0.001, 0.008, 0.002]) == {"count": 4, "median_ms": 2.5, "min_ms": 1.0, "max_ms": 8.0}
