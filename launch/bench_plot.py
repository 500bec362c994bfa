"""Figures as a picture: a bar for each, a line across it where its floor is. SVG, written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dist_vlm.launch.bench_figures import Figure

_ROW, _BAR, _PADDING = 26, 16, 16
_LABEL_WIDTH, _BAR_WIDTH, _VALUE_WIDTH = 220, 360, 150
_WIDTH = _LABEL_WIDTH + _BAR_WIDTH + _VALUE_WIDTH + 2 * _PADDING
_BAR_COLOUR, _FLOOR_COLOUR, _TEXT_COLOUR = "#4878a8", "#c0392b", "#222"


@dataclass(frozen=True, slots=True)
class _Row:
    """A bar of a panel whose longest bar, or floor, is `most` long."""

    figure: Figure
    most: float
    top: int

    def lines(self) -> list[str]:
        figure, middle = self.figure, self.top + _ROW // 2
        left, bar_top = _PADDING + _LABEL_WIDTH, middle - _BAR // 2
        width = self._length(figure.value)
        found = [
            _text(left - 8, middle, figure.label, anchor="end"),
            f'<rect x="{left}" y="{bar_top}" width="{width}" height="{_BAR}" fill="{_BAR_COLOUR}"/>',
        ]
        end = width
        if figure.floor is not None:
            at = self._length(figure.floor)
            end = max(width, at)
            found.append(
                f'<line x1="{left + at}" x2="{left + at}" y1="{bar_top - 3}" y2="{bar_top + _BAR + 3}" '
                f'stroke="{_FLOOR_COLOUR}" stroke-width="2"/>'
            )
        return [*found, _text(left + end + 8, middle, self._value())]

    def _length(self, value: float) -> float:
        return round(max(0.0, value) / self.most * _BAR_WIDTH, 1)

    def _value(self) -> str:
        share = self.figure.share
        return f"{self.figure.value:.4g}" + ("" if share is None else f" ({100 * share:.0f} %)")


def svg(title: str, figures: Sequence[Figure]) -> str:
    """A panel for each unit, in the order of the figures; all bars of a panel begin at 0."""
    body, top = [_text(_PADDING, _PADDING + 8, title, weight="bold")], _PADDING + 24
    for unit in dict.fromkeys(one.unit for one in figures):
        some = [one for one in figures if one.unit == unit]
        most = max(max(one.value, one.floor or 0.0) for one in some) or 1.0
        body.append(_text(_PADDING + _LABEL_WIDTH, top + _ROW // 2, unit, weight="bold"))
        top += _ROW
        for one in some:
            body += _Row(one, most, top).lines()
            top += _ROW
    if any(one.floor is not None for one in figures):
        body.append(_text(_PADDING, top + _ROW // 2, "line: the floor measured in the same run", colour=_FLOOR_COLOUR))
        top += _ROW
    height = top + _PADDING
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif"'
    return "\n".join([f'{head} font-size="12">', '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>\n"])


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal", colour: str = _TEXT_COLOUR
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}" fill="{colour}" '
        f'dominant-baseline="middle">{escape(text)}</text>'
    )
