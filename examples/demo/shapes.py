"""Pictures of one to four coloured shapes on a plain background.

A scene is laid out in the unit square on a 3 x 3 grid of cells, one shape a cell. Jitter stays far below the distance
between cells, so "left", "above" and the reading order are never in doubt. No two shapes of a scene share both colour
and shape: "the red circle" always names one thing.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

GRID = 3
MAX_SHAPES = 4
SHAPES = ("circle", "square", "triangle", "cross", "star")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (212, 34, 40),
    "green": (34, 158, 62),
    "blue": (42, 86, 216),
    "yellow": (242, 214, 44),
    "purple": (142, 58, 178),
    "orange": (246, 136, 24),
}
RGB = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class Shape:
    """One shape. `x`, `y` and `radius` are in the unit square, y pointing down; `row` and `column` count cells."""

    name: str
    colour: str
    row: int
    column: int
    x: float
    y: float
    radius: float
    rgb: RGB


@dataclass(frozen=True)
class Scene:
    """A picture of shapes, kept in reading order: by row, then by column."""

    shapes: tuple[Shape, ...]
    background: RGB

    @property
    def key(self) -> bytes:
        """What the scene shows, without jitter, sizes and shades: the train / held-out split goes by it."""
        return ";".join(f"{s.colour} {s.name} {s.row} {s.column}" for s in self.shapes).encode()

    def draw(self, width: int, height: int) -> Image.Image:
        """The scene in the centred square of a `width` x `height` RGB picture, both in pixels."""
        image = Image.new("RGB", (width, height), self.background)
        pen = ImageDraw.Draw(image)
        side = min(width, height)
        for shape in self.shapes:
            centre = ((width - side) / 2 + shape.x * side, (height - side) / 2 + shape.y * side)
            _draw_shape(pen, shape, centre=centre, radius=shape.radius * side)
        return image


def sample_scene(rng: random.Random) -> Scene:
    count = rng.choices((1, 2, 3, 4), weights=(3, 4, 5, 6))[0]
    # few colours in every third scene: telling its shapes apart then takes their form
    colours = rng.sample(tuple(COLOURS), 2 if rng.random() < 0.33 else len(COLOURS))
    looks = rng.sample([(name, colour) for name in SHAPES for colour in colours], count)
    cells = sorted(rng.sample(range(GRID * GRID), count))
    shapes = [_sample_shape(rng, *look, *divmod(cell, GRID)) for look, cell in zip(looks, cells, strict=True)]
    return Scene(shapes=tuple(shapes), background=_sample_background(rng))


def _sample_shape(rng: random.Random, name: str, colour: str, row: int, column: int) -> Shape:
    red, green, blue = (min(255, max(0, value + rng.randint(-16, 16))) for value in COLOURS[colour])
    return Shape(
        name=name,
        colour=colour,
        row=row,
        column=column,
        x=(column + 0.5) / GRID + rng.uniform(-0.025, 0.025),
        y=(row + 0.5) / GRID + rng.uniform(-0.025, 0.025),
        radius=rng.uniform(0.095, 0.14),
        rgb=(red, green, blue),
    )


def _sample_background(rng: random.Random) -> RGB:
    """A light or a dark grey with a slight tint: far from every colour a shape can have."""
    base = rng.randint(228, 250) if rng.random() < 0.7 else rng.randint(10, 40)
    red, green, blue = (base + rng.randint(-5, 5) for _ in range(3))
    return red, green, blue


def _draw_shape(pen: ImageDraw.ImageDraw, shape: Shape, *, centre: Point, radius: float) -> None:
    x, y = centre
    if shape.name == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shape.rgb)
    elif shape.name == "square":
        half = 0.86 * radius
        pen.rectangle((x - half, y - half, x + half, y + half), fill=shape.rgb)
    elif shape.name == "cross":
        arm, long = 0.34 * radius, radius
        pen.rectangle((x - arm, y - long, x + arm, y + long), fill=shape.rgb)
        pen.rectangle((x - long, y - arm, x + long, y + arm), fill=shape.rgb)
    else:
        corners, inner = (3, 1.0) if shape.name == "triangle" else (5, 0.42)
        pen.polygon(_corners(centre, radius=1.1 * radius, corners=corners, inner=inner), fill=shape.rgb)


def _corners(centre: Point, *, radius: float, corners: int, inner: float) -> list[Point]:
    """A regular polygon standing on its side, or with `inner` < 1 a star whose inner corners lie at that radius."""
    count = corners if inner == 1.0 else 2 * corners
    points = []
    for i in range(count):
        reach = radius * (inner if inner != 1.0 and i % 2 else 1.0)
        angle = 2 * math.pi * i / count - math.pi / 2
        points.append((centre[0] + reach * math.cos(angle), centre[1] + reach * math.sin(angle)))
    return points
