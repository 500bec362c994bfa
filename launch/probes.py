"""The prompts that a checkpoint is checked on: pictures drawn here, of several sizes and kinds, and text alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw


@dataclass(frozen=True, eq=False, slots=True)
class Probe:
    """A question about pictures, or about none."""

    name: str
    question: str
    pictures: tuple[Image.Image, ...] = ()


def make_probes(count: int, *, max_pictures: int) -> list[Probe]:
    """The first `count` of a fixed, endless row: the same probes each time.

    max_pictures: most pictures a prompt may have; those with more are left out. The row has in turn a probe of each
    kind of picture, one with two pictures, and one without.
    """
    probes: list[Probe] = []
    index = 0
    while len(probes) < count:
        num_pictures = _NUM_PICTURES[index % len(_NUM_PICTURES)]
        if num_pictures <= max_pictures:
            probes.append(_probe(index, num_pictures))
        index += 1
    return probes


_NUM_PICTURES = (1, 1, 0, 2, 1)
_SIZES = ((64, 64), (200, 75), (336, 336), (33, 140), (512, 384), (97, 131), (17, 17))
_QUESTIONS = (
    "What is in the picture?",
    "Which colours do you see, and where are they?",
    "Name a number between one and nine.",
    "What differs between the two?",
    "Describe this in one sentence, please.",
    "Is the left side brighter than the right side?",
    "Why does the sun rise in the east?",
)


def _probe(index: int, num_pictures: int) -> Probe:
    draws = [_DRAWERS[(index + place) % len(_DRAWERS)] for place in range(num_pictures)]
    sizes = [_SIZES[(index + 3 * place) % len(_SIZES)] for place in range(num_pictures)]
    pictures = tuple(
        draw(*size, np.random.default_rng((index, place)))
        for place, (draw, size) in enumerate(zip(draws, sizes, strict=True))
    )
    kinds = [draw.__name__.strip("_") for draw in draws]
    name = " + ".join(f"{kind} {width}x{height}" for kind, (width, height) in zip(kinds, sizes, strict=True))
    return Probe(f"{index}: {name or 'text alone'}", _QUESTIONS[index % len(_QUESTIONS)], pictures)


def _noise(width: int, height: int, random: np.random.Generator) -> Image.Image:
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _gradient(width: int, height: int, random: np.random.Generator) -> Image.Image:
    """Each channel rises along a direction of its own."""
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    angles = random.uniform(0, 2 * math.pi, 3)
    channels = [127.5 + 90 * (x * math.cos(angle) + y * math.sin(angle)) for angle in angles]
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


def _shapes(width: int, height: int, random: np.random.Generator) -> Image.Image:
    """Rectangles and ellipses of plain colours over one another."""
    picture = Image.new("RGB", (width, height), _colour(random))
    pen = ImageDraw.Draw(picture)
    for index in range(6):
        left, right = sorted(random.integers(0, width, 2).tolist())
        top, bottom = sorted(random.integers(0, height, 2).tolist())
        shape = pen.rectangle if index % 2 else pen.ellipse
        shape((left, top, right, bottom), fill=_colour(random))
    return picture


def _colour(random: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = random.integers(0, 256, 3).tolist()
    return red, green, blue


_DRAWERS: tuple[Callable[[int, int, np.random.Generator], Image.Image], ...] = (_noise, _shapes, _gradient)
