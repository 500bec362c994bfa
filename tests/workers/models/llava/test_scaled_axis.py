"""Where parts of a scaled picture may end, in fractions; that PIL then makes the same of them is `test_scaled_crop`."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from dist_vlm.workers.models.llava.scaled_axis import ScaledAxis

AXES = [
    ScaledAxis(length, scaled, (scaled - 336) // 2, 336)
    for length, scaled in [
        (336, 336), (480, 336), (640, 448), (1024, 448), (1081, 336), (1922, 597), (7, 336), (500, 24_000), (799, 503),
        (131_072, 4096), (131_073, 4096), (67_108_864, 672),
    ]
]  # fmt: skip


@pytest.mark.parametrize("axis", AXES, ids=str)
@pytest.mark.parametrize("most", [1, 2, 4, 7, 1000])
def test_parts_cover_what_is_kept_and_follow_one_another(axis: ScaledAxis, most: int) -> None:
    parts = axis.parts(most)
    assert 1 <= len(parts) <= most
    assert all(low < high for low, high in parts)
    assert [high for _, high in parts[:-1]] == [low for low, _ in parts[1:]]
    assert 0 <= parts[0][0] <= axis.start and axis.end <= parts[-1][1] <= axis.scaled


@pytest.mark.parametrize("axis", AXES, ids=str)
def test_ends_of_parts_are_exact_in_single_precision(axis: ScaledAxis) -> None:
    for end in {end for part in axis.parts(7) for end in part}:
        assert Fraction(float(np.float32(axis.place(end)))) == Fraction(end * axis.length, axis.scaled)


def test_no_more_is_made_than_must_be() -> None:
    assert ScaledAxis(1024, 448, 56, 336).parts(4) == [(56, 140), (140, 224), (224, 308), (308, 392)]
    # 640/199 of a pixel each: exact at none but the ends, and at 199 and 398.
    assert ScaledAxis(1920, 597, 130, 336).parts(1) == [(0, 597)]
    assert ScaledAxis(1920, 597, 130, 336).parts(4) == [(0, 199), (199, 398), (398, 597)]


def test_a_part_is_made_of_what_its_filter_reaches() -> None:
    axis = ScaledAxis(1000, 100, 0, 100)
    low, high = axis.needed(20, 30, support=2.0)
    assert low <= 200 - 20 and high >= 300 + 20
    assert axis.needed(0, 100, support=3.0) == (0, 1000)
    assert ScaledAxis(100, 1000, 0, 1000).needed(500, 510, support=2.0) == (47, 54)
