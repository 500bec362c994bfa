"""The demo's data: which pictures may be trained on, which are held out, and the examples of both.

A picture belongs to one side by the hash of what it shows: for shapes their colours, forms and cells, for a digit its
scan. So a held-out picture never occurs in training, whatever the seeds, and what is measured is new combinations.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from PIL import Image

from examples.demo import digits, questions
from examples.demo.digits import load_scans, sample_digit
from examples.demo.questions import QA
from examples.demo.shapes import Scene, sample_scene

HELD_OUT_OF_256 = 40
SIDES = (96, 400)  # pixels, the shorter side of a picture


class Picture(Protocol):
    @property
    def key(self) -> bytes: ...

    def draw(self, width: int, height: int) -> Image.Image: ...


@dataclass(frozen=True)
class Example:
    """A held-out picture with its size in pixels, and one question about it."""

    picture: Picture
    width: int
    height: int
    qa: QA

    def draw(self) -> Image.Image:
        return self.picture.draw(self.width, self.height)


def is_held_out(key: bytes) -> bool:
    return hashlib.sha256(key).digest()[0] < HELD_OUT_OF_256


def sample_split_scene(rng: random.Random, *, held_out: bool) -> Scene:
    while True:
        scene = sample_scene(rng)
        if is_held_out(scene.key) == held_out:
            return scene


@cache
def split_scans(*, held_out: bool) -> tuple[tuple[int, bytes], ...]:
    return tuple(scan for scan in load_scans() if is_held_out(scan[1]) == held_out)


def held_out_examples(count: int, seed: int) -> list[Example]:
    """`count` examples, every picture another one: four scenes, then a digit, kinds of question taken in turn."""
    scans = list(split_scans(held_out=True))
    random.Random(f"scans/{seed}").shuffle(scans)
    found = []
    for i in range(count):
        rng = random.Random(f"held-out/{seed}/{i}")
        round_, place = divmod(i, 5)
        if place < 4:
            kind = tuple(questions.KINDS)[(4 * round_ + place) % len(questions.KINDS)]
            picture, qa = _held_out_scene(rng, kind)
        else:
            kind = tuple(digits.KINDS)[round_ % len(digits.KINDS)]
            picture, qa = _held_out_digit(rng, kind, scans[round_])
        width, height = _sample_size(rng)
        found.append(Example(picture, width, height, qa))
    return found


def _held_out_scene(rng: random.Random, kind: str) -> tuple[Picture, QA]:
    while True:
        scene = sample_split_scene(rng, held_out=True)
        qa = questions.ask(scene, kind, rng)
        if qa is not None:
            return scene, qa


def _held_out_digit(rng: random.Random, kind: str, scan: tuple[int, bytes]) -> tuple[Picture, QA]:
    digit = sample_digit(rng, scan, upright=True)
    return digit, digits.ask(digit, kind, rng)


def _sample_size(rng: random.Random) -> tuple[int, int]:
    """Three of four pictures are square; of the others a processor keeps the centred square."""
    side = rng.randint(*SIDES)
    if rng.random() < 0.75:
        return side, side
    longer = int(side * rng.uniform(1.1, 1.6))
    return (longer, side) if rng.random() < 0.5 else (side, longer)
