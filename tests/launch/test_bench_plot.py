from __future__ import annotations

from xml.etree import ElementTree

from dist_vlm.launch.bench_figures import Figure
from dist_vlm.launch.bench_plot import svg

NAME = "{http://www.w3.org/2000/svg}"
FIGURES = [
    Figure("a", "step, batch 1", 4.0, "ms", 3.0),
    Figure("b", "step & more <2>", 16.0, "ms", 32.0),
    Figure("c", "requests", 30.0, "req/s"),
]


def parts(kind: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(svg("steps: model", FIGURES)).findall(NAME + kind)


def test_bars_are_as_long_as_their_figures_and_the_floors_lie_where_theirs_are() -> None:
    bars = [one for one in parts("rect") if one.get("fill") != "white"]
    left, *widths = float(bars[0].get("x", "")), *(float(one.get("width", "")) for one in bars)
    # The longest of a unit, a floor here, is 360 long; another unit has its own measure.
    assert widths == [360 * 4 / 32, 360 * 16 / 32, 360]
    assert [round(float(one.get("x1", "")) - left, 1) for one in parts("line")] == [round(360 * 3 / 32, 1), 360]
    tops = [float(one.get("y", "")) for one in bars]
    assert tops == sorted(set(tops))


def test_words_and_shares_stand_beside_them() -> None:
    said = [one.text for one in parts("text")]
    assert said == [
        "steps: model",
        "ms",
        "step, batch 1",
        "4 (75 %)",
        "step & more <2>",
        "16 (200 %)",
        "req/s",
        "requests",
        "30",
        "line: the floor measured in the same run",
    ]


def test_everything_lies_within_the_picture() -> None:
    root = ElementTree.fromstring(svg("steps: model", FIGURES))
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    for one in root.iter():
        if one.get("y") is not None:
            assert 0 < float(one.get("y", "")) < height
            assert float(one.get("x", "0")) < width
