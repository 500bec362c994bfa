from __future__ import annotations

import numpy as np
import pytest

from dist_vlm.launch.probes import make_probes


def test_the_row_is_the_same_each_time_and_begins_alike() -> None:
    first, second = make_probes(20, max_pictures=2), make_probes(7, max_pictures=2)
    assert len(first) == 20
    for one, other in zip(first, second, strict=False):
        assert (one.name, one.question) == (other.name, other.question)
        assert len(one.pictures) == len(other.pictures)
        for picture, same in zip(one.pictures, other.pictures, strict=True):
            assert np.array_equal(np.asarray(picture), np.asarray(same))


def test_the_first_eight_hold_every_kind() -> None:
    probes = make_probes(8, max_pictures=2)
    assert {len(probe.pictures) for probe in probes} == {0, 1, 2}
    pictures = [picture for probe in probes for picture in probe.pictures]
    assert all(picture.mode == "RGB" for picture in pictures)
    assert len({picture.size for picture in pictures}) >= 5
    for kind in ("noise", "gradient", "shapes"):
        assert any(kind in probe.name for probe in probes)
    assert len({probe.name for probe in probes}) == 8


def test_no_picture_is_another_or_of_one_colour() -> None:
    pictures = [picture for probe in make_probes(40, max_pictures=2) for picture in probe.pictures]
    assert len({(picture.size, picture.tobytes()) for picture in pictures}) == len(pictures)
    assert all(len(np.unique(np.asarray(picture))) > 1 for picture in pictures)


@pytest.mark.parametrize("most", [0, 1])
def test_fewer_pictures_are_respected(most: int) -> None:
    probes = make_probes(9, max_pictures=most)
    assert len(probes) == 9
    assert max(len(probe.pictures) for probe in probes) == most
