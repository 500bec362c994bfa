from __future__ import annotations

import argparse

import pytest

from dist_vlm.launch.bench_flags import several, two_lengths, whole


def test_numbers_are_read() -> None:
    assert (whole(1)("512"), whole(2)("2"), whole(0)("0")) == (512, 2, 0)
    assert several("1,16,64,16") == (1, 16, 64)
    assert two_lengths("32,160") == (32, 160)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "ten", "1e3", "\u0661", " 1", "1234567890"])
def test_a_number_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be an integer, at least 1"):
        whole(1)(text)


@pytest.mark.parametrize("text", ["1,0", "1,,2", "1 2", ","])
def test_a_list_with_a_wrong_number_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be an integer, at least 1"):
        several(text)


@pytest.mark.parametrize("text", ["32", "32,32", "64,32", "2,3,4", "1,8"])
def test_lengths_that_are_no_two_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be (two integers|an integer, at least 2)"):
        two_lengths(text)
